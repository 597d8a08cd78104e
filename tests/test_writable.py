"""Whatever a command writes is tried before the work: in /proc, which tells root that it may, and where a file is in the way."""

import os
import shlex
import signal
from pathlib import Path

import pytest

from dist_vsd.cli import main
from dist_vsd.config import RunConfig
from dist_vsd.runs.run_directory import RunDirectory
from dist_vsd.writable import TRIAL_PREFIX, require_writable_file, require_writable_folder
from tests.test_cli_bad_input import not_refused

# Each command with all that it may write; {} is where it shall go. One line says what the user called it.
COMMANDS = {
    'train "a duck" --run-dir {}/run': "run directory {}/run",
    "train --resume --run-dir {}/run": None,
    "render run --out {}/pictures": "--out '{}/pictures'",
    "render run --kind grid --out {}": "--out '{}'",
    "export run --out {}/meshes": "--out '{}/meshes'",
    "evaluate run --out {}/all.csv": "--out '{}/all.csv'",
    'prior sample "a duck" --out {}/duck.png': "--out '{}/duck.png'",
    "prior train --out {}/prior": "--out '{}/prior'",
    "prior train --work-dir {}/work": "--work-dir '{}/work'",
    "plan --json {}/plan.json": "--json '{}/plan.json'",
    "bench scaling --out {}/bench": "--out '{}/bench'",
    "sweep plan prompts.txt --sweep-dir {}/sweep": "--sweep-dir {}/sweep",
    "sweep collect sweep --out {}/results": "--out '{}/results'",
    "lab --out {}/lab": "--out '{}/lab'",
}
# What is in the way, of which kind, and the command that would write there.
IN_THE_WAY = {
    'train "a duck" --resume --run-dir run': "run/checkpoints",
    'train "a duck" --resume --run-dir run  ': "run/metrics.jsonl/",
    "render run": "run/export",
    "render run --kind views": "run/renders",
    "export run": "run/export",
    "evaluate run": "run/evaluation.json/",
    "bench scaling": "bench/scaling.json/",
    "bench scaling ": "bench/scaling.png/",
    "plan --json plan.json": "plan.json/",
    "lab": "lab/runs",
    "lab ": "lab/lab.json/",
    "sweep submit sweep --local": "sweep/leases",
    "sweep submit sweep --local ": "sweep/logs",
    "sweep retry sweep --local": "sweep/submissions",
    "sweep run sweep --id x": "sweep/configs",
    "sweep cancel sweep": "sweep/submissions",
    "sweep collect sweep": "sweep/results",
    "sweep collect sweep ": "sweep/results/results.html/",
    "sweep collect sweep --link-media": "sweep/results/media",
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the start of a run, a planned sweep and its prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    Path("prompts.txt").write_text("a green duck\n")
    RunDirectory(Path("run")).claim(RunConfig(prompt="a duck", run_dir="run"))
    assert main(["sweep", "plan", "prompts.txt", "--sweep-dir", "sweep"]) == 0
    handler = signal.signal(signal.SIGALRM, not_refused)
    signal.alarm(30)
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)


def refusal(command, capfd):
    """Return the one line with which a command is refused, after which everything is as before."""
    before = sorted(Path.cwd().rglob("*"))
    capfd.readouterr()
    assert main(shlex.split(command)) == 2
    output, errors = capfd.readouterr()
    assert (output, len(errors.splitlines())) == ("", 1), errors
    assert sorted(Path.cwd().rglob("*")) == before
    return errors


@pytest.mark.parametrize("command", [command for command, named in COMMANDS.items() if named])
@pytest.mark.parametrize("place", ["/proc", "prompts.txt"])
def test_a_place_that_takes_no_files_is_refused_before_the_work(workplace, capfd, command, place):
    line = refusal(command.format(place), capfd)
    assert COMMANDS[command].format(place) in line
    assert "can't be written" in line
    assert "choose another" in line


@pytest.mark.parametrize(("command", "obstacle"), IN_THE_WAY.items())
def test_what_is_in_the_way_of_a_file_or_folder_is_named_before_the_work(workplace, capfd, command, obstacle):
    path = Path(obstacle)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if obstacle.endswith("/") else path.write_text("")
    line = refusal(command, capfd)
    assert any(words in line for words in (f"{path} is a file", f"{path.name}' is a folder", f"{path.name} is a folder", "--out 'bench'",
                                           "--out 'lab'", "--out 'sweep/results'", "--json 'plan.json' is a folder")), line  # fmt: skip


def test_a_trial_leaves_nothing_and_makes_no_folder(tmp_path):
    require_writable_folder(tmp_path / "a" / "b", "it")
    (tmp_path / "file").write_text("kept")
    require_writable_file(tmp_path / "file", "it")
    require_writable_file(tmp_path / "c" / "new", "it")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_link_to_nowhere_is_in_the_way(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="it can't be written .*link is a file"):
        require_writable_folder(tmp_path / "link" / "below", "it")


def test_a_trial_that_was_killed_does_not_make_a_folder_another_runs(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f"{TRIAL_PREFIX}x").write_text("")
    RunDirectory(tmp_path / "run").check(RunConfig(prompt="a duck", run_dir=str(tmp_path / "run")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="it can't be written"):
        require_writable_folder(tmp_path / "below", "it")
