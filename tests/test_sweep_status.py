"""`dist-vsd sweep status`: where every run stands, by small files, for thousands of runs."""

import json
import os
import subprocess
import sys

import pytest

from dist_vsd.cli import main
from dist_vsd.runs import lease as leases
from dist_vsd.runs.outcome import Outcome, write_outcome
from dist_vsd.sweep.attempts import Attempt, attempt_file, write_attempt
from dist_vsd.sweep.manifest import PlannedRun, SweepSettings, write_manifest, write_settings
from dist_vsd.sweep.state import states_of
from dist_vsd.sweep.status_table import NUM_ROWS, duration, table, totals, totals_line
from tests.runs import environment
from tests.synthetic_sweep import plan_seeds, write_ended


def begin(sweep, run, updates=0, checkpoint=0, num_updates=100):
    """Make what a run has written after some updates, half a second each."""
    run_dir = sweep.run_dir(run)
    (run_dir / "checkpoints" / f"update_{checkpoint:08d}").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(f"prompt: a green duck\nnum_updates: {num_updates}\nfield:\n  num_updates: 7\n")
    lines = [{"update": update, "seconds/update": 0.5} for update in range(1, updates + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"update": 9')
    return run_dir


def test_every_state_is_told_by_outcome_attempt_and_lease(tmp_path):
    sweep = plan_seeds(tmp_path, 7)
    waiting, running, stopped, done, failed, refused, killed = sweep.runs
    begin(sweep, running, updates=40, checkpoint=30, num_updates=200)
    lease = leases.acquire(tmp_path / "leases", running.id)
    write_outcome(begin(sweep, stopped, 50, 50), Outcome(exit_code=75, update=50))
    write_outcome(begin(sweep, done, 100, 100), Outcome(exit_code=0, update=100))
    write_outcome(begin(sweep, failed, 20, 10), Outcome(exit_code=1, update=10, error="the disk is full"))
    write_attempt(attempt_file(sweep, refused.id), Attempt(exit_code=2, error="the prior is missing"))
    begin(sweep, killed, 30, 20)
    (tmp_path / "leases" / f"{killed.id}.3").write_text("")
    os.utime(tmp_path / "leases" / f"{killed.id}.3", (1e9, 1e9))
    found = [states_of(sweep)[run.id] for run in sweep.runs]
    assert [state.state for state in found] == ["waiting", "running", "stopped", "done", "failed", "failed", "waiting"]
    assert [(state.update, state.num_updates) for state in found] == [
        (0, 100),
        (40, 200),
        (50, 100),
        (100, 100),
        (10, 100),
        (0, 100),
        (20, 100),
    ]
    assert (found[1].updates_per_second, found[1].seconds_left) == (2.0, 80.0)
    assert [state.error for state in found[4:6]] == ["the disk is full", "the prior is missing"]
    assert "was killed without a word; the next submit goes on" in found[6].note
    assert waiting.id == found[0].run.id
    counts = totals(found)
    assert counts == {"runs": 7, "waiting": 2, "running": 1, "stopped": 1, "done": 1, "failed": 2} | {
        "updates_per_second": 2.0,
        "seconds_left": (100 + 160 + 50 + 80) / 2,
    }
    assert totals_line(counts, 2) == (
        "7 run(s): 2 waiting, 1 running, 1 stopped early, 1 done, 2 failed; 2 queued; 2.00 updates/s, 3 min left at this speed"
    )
    lease.release()


def test_the_newer_of_outcome_and_attempt_counts(tmp_path):
    sweep = plan_seeds(tmp_path, 2)
    for run, order in zip(sweep.runs, [("attempt", "outcome"), ("outcome", "attempt")], strict=True):
        run_dir = begin(sweep, run, 50, 50)
        files = {"attempt": attempt_file(sweep, run.id), "outcome": run_dir / "outcome.json"}
        write_attempt(files["attempt"], Attempt(exit_code=2, error="refused"))
        write_outcome(run_dir, Outcome(exit_code=0, update=100))
        for seconds, name in enumerate(order):
            os.utime(files[name], (1e9 + seconds, 1e9 + seconds))
    assert [state.state for state in states_of(sweep).values()] == ["done", "failed"]


def test_a_look_at_a_large_sweep_loads_nothing_heavy(tmp_path):
    """How long one of 10,000 runs takes is measured by benchmarks/sweep_speed.py."""
    write_ended(tmp_path, 1000, 900)
    code = (
        "import sys; from dist_vsd.cli import main; main(['sweep', 'status', sys.argv[1]]); "
        "sys.exit('heavy imports' if {'torch', 'diffusers', 'wandb'} & sys.modules.keys() else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("1000 run(s): 100 waiting, 0 running, 0 stopped early, 895 done, 5 failed")



def test_json_holds_all_runs_and_the_prompt_as_it_is(tmp_path, capsys):
    prompt = "[red]a\nduck[/red] \x1b[31m🦆"
    write_settings(tmp_path, SweepSettings(name="ducks"))
    write_manifest(tmp_path, [PlannedRun(prompt=prompt, tags=("t",))])
    assert main(["sweep", "status", str(tmp_path), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    (run,) = content["runs"]
    assert (content["name"], content["totals"]["waiting"], run["prompt"], run["state"]) == ("ducks", 1, prompt, "waiting")
    assert run["num_updates"] == 800, "the preset's"


def test_what_a_run_said_is_neither_markup_nor_control_characters_on_the_terminal(tmp_path, capsys):
    sweep = plan_seeds(tmp_path, 1)
    write_attempt(attempt_file(sweep, sweep.runs[0].id), Attempt(exit_code=1, error="[bold]duck[/bold] \x1b[2J\x07"))
    assert main(["sweep", "status", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "[bold]duck[/bold] ?[2J?" in output
    assert "\x1b" not in output


def test_the_table_shows_failed_and_running_runs_first(tmp_path):
    sweep = plan_seeds(tmp_path, 60)
    write_outcome(begin(sweep, sweep.runs[-1], 20, 10), Outcome(exit_code=1, update=10, error="boom"))
    lease = leases.acquire(tmp_path / "leases", sweep.runs[-2].id)
    rows, num_left_out = table(states_of(sweep).values())
    lease.release()
    assert [str(cell) for cell in list(rows.columns[1].cells)[:3]] == ["failed", "running", "waiting"]
    assert (rows.row_count, num_left_out) == (NUM_ROWS, 60 - NUM_ROWS)


def test_the_janus_rate_is_one_line_of_all_particles_that_were_evaluated(tmp_path, capsys):
    """2 of 4 particles and 1 of 1 are 3 of 5; runs without a rate, with half a file, or without any, say nothing."""
    sweep = plan_seeds(tmp_path, 5)
    for run, count, rate in zip(sweep.runs, (4, 1), (0.5, 1.0), strict=False):
        record = {"update": 50, "num_particles": count, "figures": {"particles/multi_face_rate": rate, "clip/score": 0.3}}
        (begin(sweep, run, 50, 50) / "evaluation.json").write_text(json.dumps(record))
    of_others = {"update": 50, "num_particles": 4, "figures": {"clip/score": 0.3}}
    (begin(sweep, sweep.runs[2], 50, 50) / "evaluation.json").write_text(json.dumps(of_others))
    (begin(sweep, sweep.runs[3], 50, 50) / "evaluation.json").write_text('{"update": 50, "fig')
    told = "Janus rate: 60% (3 of 5 particle(s) of 2 evaluated run(s) have more than one face)"
    for command in ("status", "collect"):
        assert main(["sweep", command, str(tmp_path)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == told
    (sweep.run_dir(sweep.runs[1]) / "checkpoints" / "update_00000060").mkdir()
    assert main(["sweep", "status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{told}; 1 of these runs went on since"
    assert main(["sweep", "status", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["faces"] == {"rate": 0.6, "runs": 2, "particles": 5, "with_more": 3, "outdated": 1}


def test_a_sweep_that_was_not_evaluated_says_nothing_of_faces(tmp_path, capsys):
    sweep = plan_seeds(tmp_path, 1)
    begin(sweep, sweep.runs[0], 50, 50)
    assert main(["sweep", "status", str(tmp_path)]) == 0
    assert "Janus" not in capsys.readouterr().out
    assert main(["sweep", "status", str(tmp_path), "--json"]) == 0
    assert "faces" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("seconds", "told"), [(45, "45 s"), (720, "12 min"), (11_100, "3 h 05 min"), (187_200, "2 d 04 h")])
def test_a_duration_has_the_two_units_that_matter(seconds, told):
    assert duration(seconds) == told
