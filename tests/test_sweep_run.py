"""`dist-vsd sweep submit | run | retry | cancel`: who runs what, once. Slurm itself is tests/test_slurm*.py's."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_vsd.cli import main
from dist_vsd.config import RunConfig
from dist_vsd.config_files import merge, read_yaml
from dist_vsd.runs import lease as leases
from dist_vsd.sweep import execute
from dist_vsd.sweep.child_process import StopSignals
from dist_vsd.sweep.execute import _take
from dist_vsd.sweep.launch import launch_command, write_run_config
from dist_vsd.sweep.local import devices_of_slot
from dist_vsd.sweep.manifest import PlannedRun, Sweep, SweepSettings, read_sweep, write_manifest, write_settings
from dist_vsd.sweep.state import states_of
from dist_vsd.sweep.submissions import SLURM, Submission, next_file, read_submissions, write_submission
from tests.runs import environment
from tests.warm_python import python

TINY = {
    "num_updates": 4, "checkpoint_every": 4, "log_every": 1, "preview_every": 100000, "turntables": False, "render_size": 16,
    "field.dense_grid.resolutions": [8, 16], "field.num_samples": 16, "wandb.mode": "disabled",
}  # fmt: skip
ENDLESS = TINY | {"num_updates": 100000, "checkpoint_every": 100000}
ODD_PROMPTS = [
    "a 'green' \"duck\"", "$(touch x) `touch x`; touch x", "two\nlines: yes", "../../etc/passwd", "<script>alert(1)</script>", "--resume",
    "ein grüner Drache", "緑のアヒル", "🦆" * 20, "word " * 1000, "{a: b}", "null", "1e-3", "\x85\u2028\x1b[31m", "%j %A",
]  # fmt: skip


def plan(path, prompts=("a green duck",), overrides=TINY, **settings):
    """Write a sweep's directory."""
    path.mkdir(exist_ok=True)
    write_settings(path, SweepSettings(name="ducks", **settings))
    write_manifest(path, [PlannedRun(prompt=prompt, overrides=overrides) for prompt in prompts])
    return read_sweep(path)


STARTED = []


@pytest.fixture(autouse=True)
def _nothing_runs_on():
    """Kill what a failed test has left; runs end with who started them."""
    yield
    while STARTED:
        STARTED.pop().kill()


def start(*words, beats=None):
    """Start `dist-vsd sweep ...`; ``beats`` are seconds between two beats of leases, and after which they are dead."""
    constants = "" if beats is None else f"leases.BEAT_SECONDS, leases.DEAD_AFTER_SECONDS = {beats[0]}, {beats[1]}; "
    code = f"import sys; from dist_vsd.runs import lease as leases; {constants}from dist_vsd.cli import main; sys.exit(main(sys.argv[1:]))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment() | {"PYTHONUNBUFFERED": "1"}}
    STARTED.append(subprocess.Popen([python(), "-c", code, "sweep", *map(str, words)], **pipes))
    return STARTED[-1]


def finish(process):
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def wait_until(condition, process=None, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def updates_logged(sweep):
    """Return the number of updates that the only run of a sweep has logged."""
    file = sweep.run_dir(sweep.runs[0]) / "metrics.jsonl"
    return sum('"update"' in line and '"event"' not in line for line in file.read_text().splitlines()) if file.exists() else 0


def only_state(sweep):
    (state,) = states_of(sweep).values()
    return state


@pytest.fixture(scope="module")
def twice_submitted(tmp_path_factory):
    """Two submits of the same sweep at the same moment: two runs that work, and one with a word that the prior does not know."""
    sweep = plan(tmp_path_factory.mktemp("twice") / "sweep", ["a green duck", "a red car", "a dragon"])
    submits = [start("submit", sweep.path, "--local", "--jobs", "2") for _ in range(2)]
    return sweep, [finish(process) for process in submits]


def test_two_submits_at_once_do_not_run_a_run_twice(twice_submitted):
    sweep, endings = twice_submitted
    outputs = "".join(output for _, output in endings)
    assert sorted(code for code, _ in endings) == [0, 1], outputs
    assert "nothing to submit" in outputs
    for run in sweep.runs:
        assert (sweep.path / "logs" / f"{run.id}.log").read_text().count("--- ") == 1
        assert f"{run.id}: " in outputs
    states = [state.state for state in states_of(sweep).values()]
    assert states == ["done", "done", "failed"], outputs


def test_a_refused_run_is_failed_with_its_own_words(twice_submitted):
    sweep, _ = twice_submitted
    failed = list(states_of(sweep).values())[2]
    assert failed.error.startswith("the embedded prior does not know 'dragon'")


def test_what_is_done_is_not_run_again_and_new_prompts_run_alone(twice_submitted, restored_signals, capsys):
    sweep, _ = twice_submitted
    assert main(["sweep", "submit", str(sweep.path), "--local"]) == 0
    assert "nothing to submit: 2 done, 1 failed; `dist-vsd sweep retry`" in capsys.readouterr().out
    assert main(["sweep", "run", str(sweep.path), "--id", sweep.runs[0].id]) == 0
    assert "done already" in capsys.readouterr().out
    assert main(["sweep", "retry", str(sweep.path), "--local", "--dry-run"]) == 0
    assert capsys.readouterr().out.split() == [sweep.runs[2].id]
    write_manifest(sweep.path, [*sweep.runs, new := PlannedRun(prompt="a blue mug", overrides=TINY)])
    assert main(["sweep", "submit", str(sweep.path), "--local", "--dry-run"]) == 0
    assert capsys.readouterr().out.split() == [new.id]
    write_manifest(sweep.path, sweep.runs)


@pytest.fixture
def restored_signals():
    """`sweep run` within this process catches signals for good."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_makes_all_ranks_save_at_once_and_the_run_ends_with_75(tmp_path):
    sweep = plan(tmp_path / "sweep", overrides=ENDLESS | {"num_particles": 2}, num_processes=2)
    process = start("run", sweep.path, "--id", sweep.runs[0].id)
    wait_until(lambda: updates_logged(sweep) >= 2, process)
    assert only_state(sweep).state == "running"
    code, output = finish(start("run", sweep.path, "--id", sweep.runs[0].id))
    assert (code, "being run by process" in output) == (0, True), "another process leaves it alone"
    process.send_signal(signal.SIGUSR1)
    code, output = finish(process)
    assert code == 75, output
    assert "stopped early, saved" in output
    state = only_state(sweep)
    assert (state.state, state.update) == ("stopped", updates_logged(sweep))
    assert "SignalException" not in (sweep.path / "logs" / f"{state.run.id}.log").read_text(), "the launcher got no signal"


def test_ranks_that_save_after_their_launcher_was_killed_are_waited_for(tmp_path):
    sweep = plan(tmp_path / "sweep", overrides=ENDLESS | {"num_particles": 2}, num_processes=2)
    process = start("run", sweep.path, "--id", sweep.runs[0].id)
    wait_until(lambda: updates_logged(sweep) >= 2, process)
    (launcher,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    os.kill(launcher, signal.SIGKILL)
    code, output = finish(process)
    assert (code, "stopped early, saved" in output) == (75, True), output
    assert (only_state(sweep).state, only_state(sweep).update) == ("stopped", updates_logged(sweep))


def test_a_stop_before_the_run_has_begun_is_no_failure(tmp_path):
    sweep = plan(tmp_path / "sweep")
    process = start("run", sweep.path, "--id", sweep.runs[0].id)
    assert "started" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75
    assert only_state(sweep).state == "stopped"


def test_a_frozen_owner_stops_its_run_and_a_killed_ones_run_stops_itself(tmp_path):
    sweep = plan(tmp_path / "sweep", overrides=ENDLESS)
    words = ("run", sweep.path, "--id", sweep.runs[0].id)
    owner = start(*words, beats=(0.2, 2.0))
    wait_until(lambda: updates_logged(sweep) >= 1, owner)
    owner.send_signal(signal.SIGSTOP)
    found = leases.find(sweep.path / "leases", sweep.runs[0].id)
    (sweep.path / "leases" / f"{sweep.runs[0].id}.{found.generation + 1}").write_text("")  # what a contender makes once it is dead
    owner.send_signal(signal.SIGCONT)
    code, output = finish(owner)
    assert code == 75, output
    assert "another process has taken this run over; stopped" in output
    for file in (sweep.path / "leases").iterdir():
        os.utime(file, (0, 0))
    before = updates_logged(sweep)
    assert (only_state(sweep).state, only_state(sweep).update) == ("stopped", before), "by the run's own word"

    owner = start(*words)
    wait_until(lambda: updates_logged(sweep) > before, owner)
    owner.kill()
    owner.communicate()
    assert only_state(sweep).state == "waiting"
    assert f"process {owner.pid} on" in only_state(sweep).note
    assert "killed without a word" in only_state(sweep).note
    wait_until(lambda: only_state(sweep).state == "stopped", seconds=60)
    assert only_state(sweep).update == updates_logged(sweep) > before
    assert "resumed from" in (sweep.path / "logs" / f"{sweep.runs[0].id}.log").read_text()


def test_a_requeued_slurm_task_waits_for_the_lease_of_its_earlier_life_and_for_no_other(tmp_path, monkeypatch, capsys):
    sweep = plan(tmp_path / "sweep")
    monkeypatch.setattr(leases, "_boot", lambda: "a node that is down")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    leases.acquire(sweep.path / "leases", sweep.runs[0].id)  # and never released
    monkeypatch.undo()
    monkeypatch.setattr(leases, "DEAD_AFTER_SECONDS", 1.0)
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert _take(sweep, sweep.runs[0], StopSignals()) is None
    assert "(Slurm job 77); nothing to do" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    lease = _take(sweep, sweep.runs[0], StopSignals())
    assert lease is not None
    lease.release()


@pytest.mark.parametrize(("job", "requeued"), [("77", True), ("78", False)])
def test_a_slurm_task_stopped_while_it_waits_for_the_lease_of_its_earlier_life_is_requeued(
    tmp_path, slurm, monkeypatch, job, requeued, restored_signals
):
    """Its run is nobody's: without a requeue it would never be gone on with. A run of another job's is not its to requeue."""
    sweep = plan(tmp_path / "sweep")
    with monkeypatch.context() as earlier:
        earlier.setattr(leases, "_boot", lambda: "a node that is down")
        earlier.setenv("SLURM_JOB_ID", "77")
        leases.acquire(sweep.path / "leases", sweep.runs[0].id)  # and never released
    (slurm / "scontrol").write_text(f"#!{sys.executable}\n{SBATCH}")
    for name, value in {"SLURM_JOB_ID": job, "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(execute.time, "sleep", lambda _seconds: signal.raise_signal(signal.SIGUSR1))
    submission = Submission(file=next_file(sweep), kind=SLURM, job="70", runs=(sweep.runs[0].id,))
    write_submission(submission)
    assert execute.execute(sweep, sweep.runs[0], submission) == (75 if requeued else 0)
    assert calls(slurm) == ([["requeue", "70_3"]] if requeued else [])


def test_cancel_stops_a_local_submission_and_starts_no_more_of_its_runs(tmp_path):
    sweep = plan(tmp_path / "sweep", ["a green duck", "a red car"], ENDLESS)
    process = start("submit", sweep.path, "--local")
    wait_until(lambda: [state.state for state in states_of(sweep).values()] == ["running", "waiting"], process)
    assert main(["sweep", "submit", str(sweep.path), "--local", "--dry-run"]) == 0, "both are someone's"
    code, output = finish(start("cancel", sweep.path))
    assert (code, "local submission: process" in output) == (0, True), output
    code, output = finish(process)
    assert (code, "stopped with 0 of 2 runs done" in output) == (75, True), output
    assert [state.state for state in states_of(sweep).values()] != ["running", "waiting"]
    assert finish(start("cancel", sweep.path))[1] == "nothing is queued or running\n"


@pytest.mark.parametrize("prompt", ODD_PROMPTS)
def test_a_prompt_reaches_the_run_as_it_is_and_no_command_line(tmp_path, prompt):
    sweep = plan(tmp_path / "sweep", [prompt])
    run, file = sweep.runs[0], write_run_config(sweep, sweep.runs[0])
    config = merge(RunConfig(), read_yaml(file), "file")
    assert config.prompt == prompt
    assert (config.wandb.group, config.field.num_samples) == ("ducks", 16)
    assert file.read_bytes().isascii(), "whatever the locale is"
    command = launch_command(sweep, run, file)
    assert prompt not in command
    assert [word for word in command if word.startswith("-")] == ["-m", "--preset", "--config", "--run-dir"]


def test_a_run_that_was_begun_is_resumed_and_ranks_get_a_launcher(tmp_path):
    sweep = plan(tmp_path / "sweep", num_processes=4, launch_config="own.yaml")
    run = sweep.runs[0]
    assert launch_command(sweep, run, tmp_path / "c.yaml")[-1] == str(sweep.run_dir(run))
    sweep.run_dir(run).mkdir(parents=True)
    (sweep.run_dir(run) / "config.yaml").write_text("")
    command = launch_command(sweep, run, tmp_path / "c.yaml")
    assert command[-1] == "--resume"
    assert command[2:7] == ["accelerate.commands.launch", "--config_file", "own.yaml", "--num_processes", "4"]


def test_runs_at_the_same_time_get_gpus_of_their_own():
    assert [devices_of_slot(slot, 2, ["0", "1", "2", "3"]) for slot in range(3)] == [["0", "1"], ["2", "3"], ["0", "1"]]
    assert devices_of_slot(1, 1, ["5"]) == ["5"]
    assert devices_of_slot(1, 1, []) == []


# A Slurm of shell scripts that write down what they are given; the real one is tests/test_slurm*.py's.
SBATCH = """import json, pathlib, sys
log = pathlib.Path(__file__).parent / "calls"
calls = log.read_text().splitlines() if log.exists() else []
log.write_text("\\n".join([*calls, json.dumps(sys.argv[1:])]) + "\\n")
print(70 + len(calls))
"""
ANSWERS = {"sinfo": "gpu\ncpu", "scontrol": "MaxArraySize            = 3", "squeue": "", "scancel": ""}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Put a Slurm of scripts on the PATH; returns its folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {name: f"print({answer!r})\n" for name, answer in ANSWERS.items()} | {"sbatch": SBATCH}
    for name, script in scripts.items():
        (folder / name).write_text(f"#!{sys.executable}\n{script}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def calls(slurm):
    return [json.loads(line) for line in (slurm / "calls").read_text().splitlines()] if (slurm / "calls").exists() else []


def test_arrays_are_cut_at_slurms_limit_and_options_are_words_of_an_argument_list(tmp_path, slurm):
    sweep = plan(tmp_path / "odd; $(touch x) %j", [f"a red car {i}" for i in range(7)])
    options = ["--limit", "2", "--partition", "gpu", "--account", "a; touch x", "--gpus-per-node", "h100:2", "--signal-seconds", "300"]
    assert main(["sweep", "submit", str(sweep.path), *options]) == 0
    made = calls(slurm)
    assert [word for words in made for word in words if word.startswith("--array")] == ["--array=0-2%2", "--array=0-2%2", "--array=0-0%2"]
    assert {"--account=a; touch x", "--partition=gpu", "--gpus-per-node=h100:2", "--signal=B:USR1@300"} < set(made[0])
    assert f"--output={str(sweep.path).replace('%', '%%')}/logs/slurm_%A_%a.out" in made[0]
    assert made[0][-4:] == [str(sweep.path / "sweep.sbatch"), str(sweep.path), str(sweep.path / "submissions/0001.json"), sys.executable]
    assert "--dependency=afterany:70" in made[1], "the limit holds for all arrays together"
    submissions = read_submissions(sweep)
    assert [submission.job for submission in submissions] == ["70", "71", "72"]
    assert [run_id for submission in submissions for run_id in submission.runs] == [run.id for run in sweep.runs]


def test_runs_of_a_living_array_are_not_submitted_again(tmp_path, slurm, capsys):
    sweep = plan(tmp_path / "sweep", ["a red car", "a blue mug", "a green duck"])
    assert main(["sweep", "submit", str(sweep.path)]) == 0
    (slurm / "squeue").write_text(f"#!{sys.executable}\nprint('70 0\\n70 2')\n")  # task 1 was lost
    assert main(["sweep", "submit", str(sweep.path)]) == 0
    assert read_submissions(sweep)[1].runs == (sweep.runs[1].id,)
    capsys.readouterr()
    (slurm / "squeue").write_text(f"#!{sys.executable}\nprint('70 0\\n70 2\\n71 0')\n")
    assert main(["sweep", "submit", str(sweep.path)]) == 0
    assert "nothing to submit: 3 waiting; those are queued already" in capsys.readouterr().out
    assert len(calls(slurm)) == 2


def test_a_dry_run_prints_the_commands_and_submits_and_writes_nothing(tmp_path, slurm, capsys):
    sweep = plan(tmp_path / "sweep")
    before = sorted(sweep.path.rglob("*"))
    assert main(["sweep", "submit", str(sweep.path), "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("sbatch --parsable --array=0-0 ")
    assert (calls(slurm), sorted(sweep.path.rglob("*"))) == ([], before)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["submit", "{sweep}", "--partition", "nope"], "partition 'nope' does not exist: use one of cpu, gpu"),
        (["submit", "{sweep}", "--local", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["submit", "{sweep}", "--jobs", "2"], "--jobs 2 goes with --local"),
        (["submit", "{sweep}", "--local", "--partition", "gpu"], "--local takes no options of Slurm"),
        (["submit", "{sweep}/none"], "holds no sweep"),
        (["run", "{sweep}", "--id", "duck"], "run 'duck' is not in"),
        (["run", "{sweep}"], "either --id ID or --submission FILE --task N"),
        (["run", "{sweep}", "--submission", "{sweep}/submissions/0009.json", "--task", "0"], "0009.json does not exist"),
        (["nope"], "sweep 'nope' does not exist"),
    ],
)
def test_bad_input_ends_with_2_and_one_line_and_nothing_is_submitted(tmp_path, slurm, capsys, words, told):
    sweep = plan(tmp_path / "sweep")
    before = sorted(sweep.path.rglob("*"))
    assert main(["sweep", *(word.format(sweep=sweep.path) for word in words)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert told in lines[0]
    assert (calls(slurm), sorted(sweep.path.rglob("*"))) == ([], before)


def test_without_slurm_or_with_another_version_of_the_sweep_nothing_is_submitted(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    sweep = plan(tmp_path / "sweep")
    assert main(["sweep", "submit", str(sweep.path)]) == 2
    assert "no sbatch on this machine: submit where Slurm is, or run here with --local --jobs N" in capsys.readouterr().err
    (sweep.path / "sweep.json").write_text('{"version": 99, "name": "ducks"}')
    assert main(["sweep", "submit", str(sweep.path), "--local"]) == 2
    assert "is of version 99" in capsys.readouterr().err
    assert sorted(file.name for file in sweep.path.iterdir()) == ["manifest.jsonl", "sweep.json"]


def test_what_sbatch_refuses_leaves_no_submission(tmp_path, slurm, capsys):
    sweep = plan(tmp_path / "sweep")
    (slurm / "sbatch").write_text(f"#!{sys.executable}\nimport sys\nsys.exit('sbatch: error: Invalid --time specification')\n")
    assert main(["sweep", "submit", str(sweep.path), "--time", "nope"]) == 2
    assert "sbatch refuses: Invalid --time specification" in capsys.readouterr().err
    assert read_submissions(Sweep(sweep.path, sweep.settings, [])) == []
