"""metrics.jsonl: what is in it after a resume, a crash, and numbers that JSON lacks."""

import json
import math

from dist_vsd.reporting.metrics import RankZeroReporter


def lines_of(file):
    return [json.loads(line, parse_constant=lambda name: f"not JSON: {name}") for line in file.read_text().splitlines()]


def resumed_at(update, file):
    """Return the lines that a run resumed after ``update`` updates finds."""
    RankZeroReporter(file, update, 10).close()
    return lines_of(file)


def test_figures_and_events_are_a_line_each_in_their_order(tmp_path):
    reporter = RankZeroReporter(tmp_path / "metrics.jsonl", 0, 10)
    reporter.log(1, {"phi/loss": 0.25, "theta/opacity": 1.0})
    reporter.event(1, 'passed over: a "checkpoint"')
    reporter.log(2, {"phi/loss": 0.125})
    reporter.close()
    assert lines_of(tmp_path / "metrics.jsonl") == [
        {"update": 1, "phi/loss": 0.25, "theta/opacity": 1.0},
        {"update": 1, "event": 'passed over: a "checkpoint"'},
        {"update": 2, "phi/loss": 0.125},
    ]


def test_a_line_can_be_read_before_the_run_ends(tmp_path):
    reporter = RankZeroReporter(tmp_path / "metrics.jsonl", 0, 10)
    reporter.log(1, {"phi/loss": 0.25})
    assert lines_of(tmp_path / "metrics.jsonl") == [{"update": 1, "phi/loss": 0.25}]
    reporter.close()


def test_lines_after_the_resumed_update_are_dropped_and_earlier_ones_kept(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"update": update, "phi/loss": 0.5}) + "\n" for update in range(1, 8)))
    assert [line["update"] for line in resumed_at(4, file)] == [1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_starts_anew_keeps_no_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"update": 1}\n{"update": 2}\n')
    assert resumed_at(0, file) == []


def test_what_a_crash_left_half_written_is_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"update": 1}\n{"upda\n\x00\x00\x00\n[3]\n7\n{"loss": 1}\n{"update": null}\n{"update": 2}\n{"update": 3, "phi/lo')
    assert resumed_at(9, file) == [{"update": 1}, {"update": 2}]


def test_bytes_that_are_no_text_do_not_stop_a_resume(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"update": 1}\n\xff\xfe\x80\n{"update": 2}\n')
    assert resumed_at(9, file) == [{"update": 1}, {"update": 2}]


def test_a_whole_last_line_without_its_end_does_not_run_into_the_next(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"update": 1}\n{"update": 2}')
    reporter = RankZeroReporter(file, 5, 10)
    reporter.log(6, {})
    reporter.close()
    assert lines_of(file) == [{"update": 1}, {"update": 2}, {"update": 6}]


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    reporter = RankZeroReporter(tmp_path / "metrics.jsonl", 0, 10)
    reporter.log(1, {"a/b": math.nan, "c/d": math.inf, "e/f": -math.inf, "g/h": 2.0})
    reporter.close()
    assert lines_of(tmp_path / "metrics.jsonl") == [{"update": 1, "a/b": None, "c/d": None, "e/f": None, "g/h": 2.0}]


def test_without_a_terminal_progress_is_a_line_at_intervals_and_at_the_end(tmp_path, capsys):
    reporter = RankZeroReporter(tmp_path / "metrics.jsonl", 0, 3, seconds_between_lines=3600.0)
    reporter.log(1, {"phi/loss": 0.25})
    for update in (1, 2, 3):
        reporter.advance(update)
    reporter.close()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1
    assert printed[0].startswith("update 3/3 ")
    assert "phi loss 0.250" in printed[0]
