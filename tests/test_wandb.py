"""What wandb is given, read back from its own files; and that no trouble of wandb's touches a run."""

import contextlib
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import yaml

from dist_vsd.commands.train_words import parse_words
from dist_vsd.config import RunConfig, WandbConfig
from dist_vsd.config_files import FREE_ON_RESUME, to_mapping, to_yaml
from dist_vsd.image_files import write_png
from dist_vsd.reporting import wandb_reporter
from dist_vsd.reporting.metrics import RankZeroReporter
from dist_vsd.reporting.wandb_follower import has_key, resolve_mode
from dist_vsd.reporting.wandb_records import HEADER, MAGIC, last_recorded_update, read_messages, read_records, rows_of
from dist_vsd.reporting.wandb_reporter import WandbReporter, open_reporter, run_id_of
from dist_vsd.runs.outcome import read_outcome
from tests.ranks import Ranks, run_ranks
from tests.runs import ROOT, TINY

KEY = "0123456789" * 4
CONFIG = RunConfig(prompt='"quoted" $(touch x) 緑', num_updates=200, wandb=WandbConfig(group="my sweep", tags=("night",)))


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    """No test finds a key or settings of the person who runs it."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no settings"))


def begin(folder, first=0, mode="offline", config=CONFIG):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    return WandbReporter(RankZeroReporter(folder / "metrics.jsonl", first, config.num_updates), config, folder, mode)


def log(reporter, updates):
    for update in updates:
        reporter.log(update, {"phi/loss": 1 / update, "theta/opacity": 0.5})
        reporter.advance(update)


def files_of(folder):
    return sorted(folder.glob("wandb/*run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns)


def recorded(folder):
    """Return {update: phi/loss} of all .wandb files of a run in the order of their starts, as `wandb sync` joins them; each once."""
    rows = [row for file in files_of(folder) for row in rows_of(file) if "phi/loss" in row]
    updates = [row["update"] for row in rows]
    assert updates == sorted(set(updates)), f"doubles, or out of order: {updates}"
    assert [row["_step"] for row in rows] == updates
    return {row["update"]: row["phi/loss"] for row in rows}


def logged(folder):
    """Return the same of metrics.jsonl."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["update"]: line["phi/loss"] for line in lines if "phi/loss" in line}


def events(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["event"] for line in lines if "event" in line]


def records(folder, kind):
    return [getattr(r, kind) for file in files_of(folder) for r in read_records(file) if r.WhichOneof("record_type") == kind]


def wait_until(happens, seconds=60):
    until = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_run_is_recorded_whole_with_group_name_tags_config_media_and_its_configuration_as_an_artifact(tmp_path):
    run = tmp_path / "run"
    reporter = begin(run)
    log(reporter, [10])
    for shard, value in enumerate((0.0, 1.0)):
        write_png(torch.full((1, 3, 4, 4), value), run / "renders" / f"{shard}.png")
    (run / "export").mkdir()
    (run / "export" / "turn.mp4").write_bytes(b"no video, and wandb does not look")
    (run / "export" / "mesh.glb").write_bytes(b"glTF")
    files = {"media/grid": ["renders/0.png", "renders/1.png"], "media/turntable": ["export/turn.mp4"], "media/mesh": ["export/mesh.glb"]}
    reporter.show(10, files)
    log(reporter, [20])
    reporter.close(0)
    assert recorded(run) == logged(run) == {10: 0.1, 20: 0.05}
    assert events(run) == []
    (told,) = records(run, "run")
    assert (told.run_group, told.display_name, told.project) == ("my sweep", "run", "dist_vsd")
    assert (list(told.tags), told.run_id) == (["vsd", "radiance_field", "night"], (run / "wandb_id").read_text().strip())
    config = {item.key: json.loads(item.value_json) for item in told.config.update}
    assert {name: config[name] for name in to_mapping(CONFIG)} == json.loads(json.dumps(to_mapping(CONFIG)))
    defined = [(m.name, m.glob_name, m.step_metric) for m in records(run, "metric")]
    assert defined[:2] == [("update", "", ""), ("", "*", "update")]
    assert {step for _, _, step in defined[2:]} <= {"update"}  # some versions write down what "*" stood for
    first, _ = [row for file in files_of(run) for row in rows_of(file)]
    assert (first["media/grid.width"], first["media/grid.height"]) == (4, 8)  # of two shards, below one another
    assert first["media/turntable._type"] == "videos"
    assert first["media/mesh._type"] == "object3D"
    assert [a.type for a in records(run, "artifact")] == ["config"]
    assert [e.exit_code for e in records(run, "exit")] == [0]
    inside = [path for path in tmp_path.iterdir() if path != run]
    assert inside == []  # wandb writes nothing beside the run directory


def test_after_a_requeue_curves_go_on_without_gaps_or_doubles_under_one_run_id(tmp_path):
    run = tmp_path / "run"
    reporter = begin(run)
    log(reporter, range(10, 140, 10))
    reporter.close(75)
    reporter = begin(run, first=100)  # the newest checkpoint: 110 to 130 come again
    log(reporter, range(110, 170, 10))
    reporter.close(0)
    assert recorded(run) == logged(run) == {update: 1 / update for update in range(10, 170, 10)}
    assert len({told.run_id for told in records(run, "run")}) == 1
    assert len(files_of(run)) == 2
    assert len(records(run, "preempting")) == 1


def test_what_wandb_lost_when_everything_was_killed_is_made_up_for_at_the_next_start(tmp_path):
    run = tmp_path / "run"
    reporter = begin(run)
    log(reporter, range(10, 60, 10))
    wait_until(lambda: files_of(run))
    kill_all(reporter)
    held = recorded(run)
    assert len(held) < 5  # what its service had not written yet
    reporter = begin(run, first=50)
    log(reporter, [60])
    reporter.close(0)
    assert recorded(run) == logged(run) == {update: 1 / update for update in range(10, 70, 10)}


def kill_all(reporter):
    """End wandb's process and its service by SIGKILL."""
    for pid in family(reporter):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    reporter._process.wait()


def family(reporter):
    """Return the ids of wandb's process and of its service."""
    pid = reporter._process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert children
    return [pid, *map(int, children)]


@contextlib.contextmanager
def silent_server():
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


@contextlib.contextmanager
def no_server():
    """A port on which nobody listens."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@pytest.mark.parametrize("server", [no_server, silent_server])
def test_an_unreachable_server_costs_a_run_nothing_is_told_once_and_the_run_is_recorded_offline(tmp_path, monkeypatch, server):
    impatient = "import dist_vsd.reporting.wandb_follower as f; f.INIT_SECONDS = 3.0; f.main()"
    monkeypatch.setattr(wandb_reporter, "FOLLOWER", ("-c", impatient))
    run = tmp_path / "run"
    with server() as port:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        begun = time.monotonic()
        run.mkdir()
        (run / "config.yaml").write_text(to_yaml(CONFIG))
        reporter = open_reporter(CONFIG, 0, run, 0)
        log(reporter, range(10, 60, 10))
        assert time.monotonic() - begun < 1.0  # the run does not wait
        reporter.close(0)
    assert time.monotonic() - begun < 50.0
    (told,) = events(run)
    assert "wandb can't go online" in told
    assert "wandb sync" in told
    assert recorded(run) == logged(run) == {update: 1 / update for update in range(10, 60, 10)}


def test_a_wandb_process_that_dies_is_told_once_and_the_run_goes_on(tmp_path):
    reporter = begin(tmp_path / "run")
    reporter._process.kill()
    reporter._process.wait()
    log(reporter, [10, 20, 30])
    reporter.close(0)
    assert events(tmp_path / "run") == ["wandb's process has ended: the run goes on, metrics.jsonl holds what it logs"]
    assert len(logged(tmp_path / "run")) == 3


def test_a_wandb_process_that_hangs_delays_the_end_of_a_run_by_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_reporter, "FOLLOWER", ("-c", "import time; time.sleep(1000)"))
    monkeypatch.setattr(wandb_reporter, "CLOSE_SECONDS", 1.0)
    reporter = begin(tmp_path / "run")
    log(reporter, [10])
    process, begun = reporter._process, time.monotonic()
    reporter.close(0)
    assert time.monotonic() - begun < 5.0
    assert process.returncode == -signal.SIGKILL
    assert events(tmp_path / "run") == ["wandb has not finished after 1 s: what is missing can be uploaded with wandb sync"]


def test_after_a_stop_wandb_gets_ten_seconds_and_what_it_missed_is_made_up_for_at_the_next_start(tmp_path, monkeypatch):
    """Slurm ends a job two minutes after its signal, and a sweep's user waits: the record is metrics.jsonl."""
    assert wandb_reporter.STOPPED_SECONDS <= 10.0
    run = tmp_path / "run"
    with monkeypatch.context() as hanging:
        hanging.setattr(wandb_reporter, "FOLLOWER", ("-c", "import time; time.sleep(1000)"))
        hanging.setattr(wandb_reporter, "STOPPED_SECONDS", 1.0)
        reporter = begin(run)
        log(reporter, [10, 20, 30])
        reporter.close(75)
    assert events(run) == ["wandb has not finished after 1 s: what is missing is made up for when the run goes on"]
    assert files_of(run) == []
    reporter = begin(run, first=30)
    log(reporter, [40])
    reporter.close(0)
    assert recorded(run) == logged(run) == {update: 1 / update for update in (10, 20, 30, 40)}


def test_a_stopped_run_has_saved_and_told_its_outcome_before_wandb_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    words = ["a green duck", *TINY, "--num-updates", "8", "--checkpoint-every", "100000", "--run-dir", str(run)]
    ranks = Ranks(words, fault=("stopped_while_wandb_hangs", "0"))
    (process,) = ranks.processes
    wait_until(lambda: not process.is_alive() or (run / "outcome.json").exists())
    assert process.is_alive(), ranks.output(0)  # wandb may take as long as it likes
    process.kill()  # as Slurm does
    outcome = read_outcome(run)
    assert (outcome.exit_code, outcome.update) == (75, 6)
    assert (run / "checkpoints/update_00000006/manifest.json").exists()
    ranks.finish()
    code, output = run_ranks(["--resume", "--run-dir", str(run)])
    assert code == 0, output
    assert recorded(run) == logged(run)
    assert sorted(logged(run)) == list(range(1, 9))


def test_a_wandb_that_is_broken_is_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken" / "wandb").mkdir(parents=True)
    (tmp_path / "broken" / "wandb" / "__init__.py").write_text("raise ImportError('half\\ninstalled')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'broken'}:{ROOT}")
    reporter = begin(tmp_path / "run")
    log(reporter, [10])
    reporter.close(0)
    (told,) = events(tmp_path / "run")
    assert told.startswith("wandb gave up (ImportError: half installed)")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_every_process_of_a_job_does_not_end_the_recording(tmp_path, number):
    run = tmp_path / "run"
    reporter = begin(run)
    log(reporter, [10])
    wait_until(lambda: files_of(run))
    for pid in family(reporter):
        os.kill(pid, number)
    log(reporter, [20])
    reporter.close(75)
    assert recorded(run) == logged(run) == {10: 0.1, 20: 0.05}
    assert events(run) == []


@pytest.mark.parametrize(
    ("mode", "variable", "key", "resolved"),
    [
        ("auto", "", True, "online"), ("auto", "", False, "offline"), ("auto", "disabled", True, "disabled"),
        ("auto", "offline", True, "offline"), ("auto", "online", False, "online"), ("auto", "dryrun", True, "offline"),
        ("auto", "nonsense", False, "offline"), ("online", "disabled", False, "online"), ("disabled", "online", True, "disabled"),
    ],
)  # fmt: skip
def test_the_mode_is_the_flags_then_the_variables_then_online_if_there_is_a_key(mode, variable, key, resolved):
    assert resolve_mode(mode, {"WANDB_MODE": variable}, lambda _: key) == resolved


def test_a_key_is_found_where_wandb_finds_it(tmp_path):
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    home = {"HOME": str(tmp_path)}
    assert has_key({"HOME": "/nowhere", "WANDB_API_KEY": KEY})
    assert has_key(home)
    assert not has_key({"HOME": "/nowhere"})
    assert not has_key({**home, "WANDB_BASE_URL": "https://wandb.example.org"})  # the key is another server's
    (tmp_path / ".config" / "wandb").mkdir(parents=True)
    (tmp_path / ".config" / "wandb" / "settings").write_text("[default]\nbase_url = https://wandb.example.org\n")
    assert not has_key(home)
    for useless in ("machine wandb.example.org login user password", "machine wandb.example.org nonsense"):
        (tmp_path / ".netrc").write_text(useless)
        assert not has_key(home)


def test_the_run_id_is_the_agents_at_the_first_start_and_stays(tmp_path):
    assert run_id_of(tmp_path, {"WANDB_RUN_ID": "abc123"}) == "abc123"
    assert run_id_of(tmp_path, {"WANDB_RUN_ID": "other"}) == run_id_of(tmp_path, {}) == "abc123"
    (tmp_path / "wandb_id").write_text("../x\n")
    assert len(run_id_of(tmp_path, {"WANDB_RUN_ID": "../y"})) == 16


def test_every_field_of_wandbs_may_change_on_resume():
    assert {f"wandb.{name}" for name in to_mapping(WandbConfig())} | {"preview_every"} <= FREE_ON_RESUME


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--wandb.mode", "onlin"], "did you mean online"),
        (["--wandb.tags", "x" * 65], "1 to 64 characters"),
        (["--preview-every", "0"], "at least 1"),
    ],
)
def test_wrong_words_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        parse_words(["a green duck", *arguments])


def test_a_torn_file_is_read_up_to_its_tear(tmp_path):
    run = tmp_path / "run"
    reporter = begin(run)
    log(reporter, range(1, 200))  # several blocks
    reporter.close(0)
    (file,) = files_of(run)
    content = file.read_bytes()
    assert len(content) > 2 * 32768
    assert last_recorded_update(run / "wandb") == 199
    file.write_bytes(content[: len(content) // 2])
    assert 50 < last_recorded_update(run / "wandb") < 150
    torn = bytearray(content)
    torn[len(content) // 2] ^= 255
    assert len(list(read_messages(bytes(torn)))) < len(list(read_messages(content)))
    assert list(read_messages(b"")) == list(read_messages(HEADER.pack(*MAGIC))) == []
    assert last_recorded_update(tmp_path / "nothing") == -1


def test_a_run_on_two_ranks_stopped_and_resumed_is_one_run_with_figures_and_media_of_all_ranks(tmp_path, monkeypatch):
    """The whole way: two ranks, a signal, --resume."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    words = ["a duck", *TINY, "--num-updates", "100000", "--checkpoint-every", "100000", "--preview-every", "4", "--run-dir", str(run)]
    ranks = Ranks([*words, "--wandb.group", "sweep"], num_ranks=2, fault=("rank_is_slow", "1"))
    file = run / "metrics.jsonl"
    wait_until(lambda: not ranks.processes[0].is_alive() or (file.exists() and "media" in file.read_text()), 300)
    for rank in range(2):
        ranks.signal(rank, signal.SIGTERM)
    codes, output = ranks.finish()
    assert "everything is saved" in output, (codes, output)
    stopped = max(logged(run))
    text = (run / "config.yaml").read_text().replace("num_updates: 100000", f"num_updates: {stopped + 2}")
    (run / "config.yaml").write_text(text)
    for manifest in run.glob("checkpoints/*/manifest.json"):  # the number of updates is part of what a checkpoint belongs to
        adopt(manifest, text)
    code, output = run_ranks(["--resume", "--run-dir", str(run)], num_ranks=2)
    assert code == 0, output
    assert recorded(run) == logged(run)
    assert sorted(logged(run)) == list(range(1, stopped + 3))
    assert len({told.run_id for told in records(run, "run")}) == 1
    assert {told.run_group for told in records(run, "run")} == {"sweep"}
    rows = [row for file in files_of(run) for row in rows_of(file)]
    shown = [row for row in rows if "media/grid.path" in row]
    assert [row["update"] for row in shown] == [*range(4, stopped + 1, 4), *([stopped + 2])] or stopped % 4 == 2
    assert {row["media/grid.height"] for row in shown} == {64}  # one particle of each rank, 16 pixels twice enlarged
    assert {row["media/turntable.count"] for row in shown} == {2}
    meshes = sorted((run / "export").glob("mesh_*.glb"))
    assert len(meshes) == 2
    sent = {file.read_bytes() for file in run.glob("wandb/*/files/media/object3D/media/mesh_*.glb")}
    assert {file.read_bytes() for file in meshes} <= sent
    for name in ("phi/gradient_norm", "clip/score", "clip/r_precision", "particles/diversity", "speed/updates_per_second"):
        assert any(name in row for row in rows), name
    assert any(name.startswith("score/gap_t") for row in rows for name in row)
    shares = [row["speed/all_reduce_share"] for row in rows if 2 < row["update"] <= stopped]
    assert 0.05 < sum(shares) / len(shares) < 0.9  # rank 0 waits for the other, which sleeps


def adopt(manifest, text):
    from dist_vsd.config_files import config_fingerprint, merge

    content = json.loads(manifest.read_text())
    content["config_sha256"] = config_fingerprint(merge(RunConfig(), yaml.safe_load(text), "test"))
    manifest.write_text(json.dumps(content))
