"""A run's directory: its name, its lock, and who may use it."""

import re
import subprocess
import sys

import pytest

from dist_vsd.config import RunConfig
from dist_vsd.config_files import merge, read_yaml
from dist_vsd.particles.particle_configs import RadianceFieldConfig
from dist_vsd.runs.run_directory import RunDirectory, default_run_dir, output_folder
from dist_vsd.score.score_config import ScoreConfig
from tests.runs import environment

CONFIG = RunConfig(prompt="a green duck")
HOLDER = """
import sys
from pathlib import Path
from dist_vsd.config import RunConfig
from dist_vsd.runs.run_directory import RunDirectory
directory = RunDirectory(Path(sys.argv[1]))
directory.claim(RunConfig(prompt="a green duck"))
print("claimed", flush=True)
sys.stdin.read()
"""
ODD_PROMPTS = [
    "..",
    "../../etc/passwd",
    "/",
    "~/duck",
    "a/b\\c:d*e?\"f<g>h|i",
    "-rf",
    ".hidden",
    "CON",
    "緑のアヒル",
    "🦆" * 400,
    "ein grüner Drache",
    "a green duck\nand a red car",
    "a  green duck",
    "a green duck.",
    "word " * 2000,
    "x" * 5000,
    "$(reboot); `reboot`",
    "a\x00b",
]


def test_a_claimed_directory_is_refused_to_others_until_its_process_ends(tmp_path):
    path = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), **pipes) as holder:
        assert holder.stdout.readline() == "claimed\n"
        with pytest.raises(ValueError, match="run is in use by a running process: wait"):
            RunDirectory(path).claim(CONFIG)
        assert merge(RunConfig(), RunDirectory(path).saved_config(), "saved") == CONFIG
        holder.kill()  # a process that is killed leaves no lock behind
        holder.wait()
        RunDirectory(path).claim(CONFIG)


def test_a_lock_of_a_dead_process_alone_does_not_make_the_folder_foreign(tmp_path):
    """A process that was killed, or met a full disk, after the lock and before config.yaml."""
    (tmp_path / ".lock").write_text("")
    RunDirectory(tmp_path).check(CONFIG)


@pytest.mark.parametrize("prompt", ODD_PROMPTS, ids=lambda prompt: ascii(prompt[:20]))
def test_any_prompt_gives_one_short_safe_folder_name(prompt):
    path = default_run_dir(prompt)
    assert path.parts[0] == "runs"
    assert len(path.parts) == 2
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]*[a-z0-9]", path.name)
    assert len(path.name) <= 50


def test_different_prompts_get_different_folders():
    prompts = [*ODD_PROMPTS, "a green duck", "a green-duck", "a green duck!", "word " * 1999, "x" * 4999, "ein gruner Drache", ""]
    names = [default_run_dir(prompt) for prompt in prompts]
    assert len(set(names)) == len(prompts)


def test_a_plain_prompt_is_its_folders_name():
    assert str(default_run_dir("a green duck")) == "runs/a-green-duck"


def test_a_check_of_a_new_or_empty_folder_passes_and_writes_nothing(tmp_path):
    RunDirectory(tmp_path).check(CONFIG)
    RunDirectory(tmp_path / "new" / "deep").check(CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_claim_writes_the_configuration_once(tmp_path):
    RunDirectory(tmp_path).claim(CONFIG)
    assert merge(RunConfig(), read_yaml(tmp_path / "config.yaml"), "saved") == CONFIG
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.yaml"]
    written = (tmp_path / "config.yaml").stat().st_mtime_ns
    RunDirectory(tmp_path).claim(RunConfig(prompt="a green duck", resume=True, log_every=3))
    assert (tmp_path / "config.yaml").stat().st_mtime_ns == written


@pytest.mark.parametrize("name", ["checkpoint_every", "keep_checkpoints", "log_every", "check_every", "preview_every"])
def test_a_resumed_run_may_change_what_does_not_touch_its_trajectory(tmp_path, name):
    RunDirectory(tmp_path).claim(CONFIG)
    RunDirectory(tmp_path).check(RunConfig(prompt="a green duck", resume=True, **{name: 7}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "a red car"}, "can't change prompt from 'a green duck' to 'a red car'"),
        ({"num_particles": 5}, "can't change num_particles from 2 to 5"),
        ({"guidance_scale": 5.0}, "can't change guidance_scale from 7.5 to 5.0"),
        ({"precision": "bf16"}, "can't change precision from '' to 'bf16'"),
        ({"score": ScoreConfig(pose_dropout=0.5)}, "can't change score.pose_dropout from 0.1 to 0.5"),
        ({"field": RadianceFieldConfig(bound=2.0)}, "can't change field.bound from 1.0 to 2.0"),
    ],
)
def test_a_resumed_run_may_not_change_its_trajectory(tmp_path, change, message):
    RunDirectory(tmp_path).claim(CONFIG)
    with pytest.raises(ValueError, match=re.escape(message)):
        RunDirectory(tmp_path).check(RunConfig(**{"prompt": "a green duck", "resume": True} | change))


def test_what_a_stage_has_left_is_written_beside_what_the_run_has(tmp_path):
    assert output_folder(str(tmp_path), "export") == tmp_path / "export"
    assert output_folder(f"{tmp_path}@coarse", "export") == tmp_path / "export" / "coarse"
    (tmp_path / "a@b").mkdir()  # a folder's own name wins
    assert output_folder(str(tmp_path / "a@b"), "export") == tmp_path / "a@b" / "export"
