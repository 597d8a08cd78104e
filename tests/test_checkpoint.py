"""Checkpoints: whole or passed over, pruned, and safe from a failing disk."""

import json
import random
import shutil
import signal
import subprocess

import pytest
import torch

from dist_vsd.cli import main
from dist_vsd.config import RunConfig
from dist_vsd.config_files import merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.runs.checkpoint import CheckpointError, newest_valid, restore, save
from dist_vsd.runs.run_directory import RunDirectory
from dist_vsd.runs.stop_request import STOP_SIGNALS
from dist_vsd.serialization import read_tensors
from dist_vsd.training.state import build_state, phi_tensors
from dist_vsd.training.update import update
from tests.limits import largest_file

TINY = [
    "--representation", "image", "--image.resolution", "16", "--num-particles", "2", "--num-updates", "4", "--checkpoint-every", "2",
    "--log-every", "1", "--preview-every", "100",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _signal_handlers_are_put_back():
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two small pictures with checkpoints of updates 2 and 4."""
    folder = tmp_path_factory.mktemp("checkpoint") / "run"
    assert main(["train", "a green duck", *TINY, "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def state(finished):
    """The same run's state, updated once."""
    config = merge(RunConfig(), RunDirectory(finished).saved_config(), "saved")
    state = build_state(config, Layout.of(2), torch.device("cpu"))
    update(state, 0)
    return state


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def change_manifest(folder, **changes):
    (folder / "manifest.json").write_text(json.dumps(manifest_of(folder) | changes))


def everything(state):
    """Return copies of all that a checkpoint must hold."""
    tensors = {f"{p.id}/{name}": t.clone() for p in state.particles for name, t in p.tensors().items()}
    moments = {f"adam/{name}": value.clone() for name, value in state.phi.moments().items()}
    return tensors | moments | {name: t.detach().clone() for name, t in phi_tensors(state).items()}


def newest(folder, state):
    """Return the newest valid checkpoint of a state's run."""
    return newest_valid(folder, state.config)[0]


def different(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def flip_a_bit(folder):
    content = bytearray((folder / "phi.safetensors").read_bytes())
    content[-100] ^= 1
    (folder / "phi.safetensors").write_bytes(content)


def truncate(folder):
    file = folder / "particles" / "0001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def name_outside(folder):
    outside = "../../config.yaml"
    change_manifest(folder, sha256=manifest_of(folder)["sha256"] | {outside: "0"})


DAMAGES = {
    "a truncated file": (truncate, "particles/0001.safetensors is damaged (its sha256 differs)"),
    "a flipped bit": (flip_a_bit, "phi.safetensors is damaged (its sha256 differs)"),
    "an empty file": (lambda f: (f / "phi_optimizer.safetensors").write_bytes(b""), "phi_optimizer.safetensors is damaged"),
    "a missing file": (lambda f: (f / "particles" / "0000.safetensors").unlink(), "particles/0000.safetensors is missing"),
    "a missing manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing or unreadable"),
    "half a manifest": (lambda f: (f / "manifest.json").write_text('{"version": 1, "upd'), "manifest.json is missing or unreadable"),
    "an odd manifest": (lambda f: (f / "manifest.json").write_text("[1]"), "manifest.json is missing or unreadable"),
    "a newer version": (lambda f: change_manifest(f, version=4), "it has format version 4; this program"),
    "an older version": (lambda f: change_manifest(f, version=2), "it has format version 2, which dist_vsd 0.2 to"),
    "another configuration's": (lambda f: change_manifest(f, config_sha256="0" * 64), "it is from a run with another configuration"),
    "fewer particles": (lambda f: change_manifest(f, num_particles=3), "it is from a run with another configuration"),
    "a particle that is not named": (
        lambda f: change_manifest(f, sha256={k: v for k, v in manifest_of(f)["sha256"].items() if "0001" not in k}),
        "its manifest does not name particles/0001.safetensors",
    ),
    "another update's": (lambda f: change_manifest(f, update=3), "its manifest is of update 3"),
    "a path outside": (name_outside, "its manifest names ../../config.yaml, outside of it"),
}


def test_a_checkpoint_holds_what_the_design_says(finished):
    newest = finished / "checkpoints" / "update_00000004"
    files = {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()}
    named = {"phi.safetensors", "phi_optimizer.safetensors", "particles/0000.safetensors", "particles/0001.safetensors"}
    assert files == {"manifest.json", *named}
    manifest = manifest_of(newest)
    assert (manifest["version"], manifest["update"], manifest["world_size"], manifest["num_particles"]) == (3, 4, 1, 2)
    assert set(manifest["sha256"]) == named
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["update_00000002", "update_00000004"]


@pytest.mark.parametrize(("damage", "says"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_named_and_passed_over_for_the_older_one(run, state, damage, says):
    damage(run / "checkpoints" / "update_00000004")
    found, notes = newest_valid(run / "checkpoints", state.config)
    assert (found.update, found.path.name) == (2, "update_00000002")
    assert len(notes) == 1
    assert notes[0].startswith(f"checkpoint update_00000004 is passed over: {says}")


@pytest.mark.parametrize("seed", range(40))
def test_whatever_stands_in_a_manifest_it_is_passed_over_in_one_line(run, state, seed):
    """Each entry in turn becomes some other JSON value, at times a nested one, at times with odd names of files."""
    generator = random.Random(seed)
    folder = run / "checkpoints" / "update_00000004"
    long = "9" * 5000
    odd = [None, True, -1, 1e400, float("nan"), "", long, [], {}, [[]], {"a": {}}, {"\0": "0"}, {long: "0"}, {"..": 1}]
    key = generator.choice(["version", "update", "sha256", "config_sha256", "num_particles"])
    change_manifest(folder, **{key: generator.choice(odd)})
    found, notes = newest_valid(run / "checkpoints", state.config)
    assert found.update == 2
    assert len(notes) == 1
    assert "\n" not in notes[0]
    assert len(notes[0]) < 300


def test_a_run_resumed_past_a_damaged_checkpoint_ends_to_the_bit_where_it_ended_before(finished, run, capsys):
    flip_a_bit(run / "checkpoints" / "update_00000004")
    assert main(["train", "--resume", "--run-dir", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "checkpoint update_00000004 is passed over: phi.safetensors is damaged" in printed
    assert "resumed from update_00000002" in printed
    events = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "event" in line]
    assert [line["update"] for line in events] == [2, 2]
    one, other = (manifest_of(folder / "checkpoints" / "update_00000004") for folder in (finished, run))
    assert one == other  # the sha256 of every file among it


def test_a_run_without_a_whole_checkpoint_is_refused_with_every_reason(run, capsys):
    truncate(run / "checkpoints" / "update_00000004")
    (run / "checkpoints" / "update_00000002" / "manifest.json").unlink()
    for command in (["train", "--resume", "--run-dir", str(run)], ["render", str(run)]):
        assert main(command) == 2
        message = capsys.readouterr().err
        assert "no valid checkpoint" in message
        assert "update_00000004 is passed over: particles/0001.safetensors is damaged" in message
        assert "update_00000002 is passed over: manifest.json is missing" in message


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_at_update_0(finished, run, capsys):
    shutil.rmtree(run / "checkpoints")
    assert main(["train", "--resume", "--run-dir", str(run)]) == 0
    assert "no checkpoint was saved yet: starting from update 0" in capsys.readouterr().out
    one, other = (manifest_of(folder / "checkpoints" / "update_00000004") for folder in (finished, run))
    assert one == other


def test_leftovers_of_a_killed_save_are_ignored_and_replaced(run, state):
    folder = run / "checkpoints"
    partial = shutil.copytree(folder / "update_00000004", folder / ".partial_00000006")
    (partial / "particles" / "junk").write_bytes(b"half")
    (folder / "update_7").mkdir()
    (folder / "update_00000009.tmp").mkdir()
    found, notes = newest_valid(folder, state.config)
    assert (found.update, notes) == (4, [])
    saved = save(state, folder, 6)
    assert not partial.exists()
    assert not (saved / "particles" / "junk").exists()
    assert newest(folder, state).update == 6


def test_only_the_newest_checkpoints_are_kept(tmp_path, state):
    for done in (1, 2, 3, 4, 12):
        save(state, tmp_path, done)
    assert state.config.keep_checkpoints == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["update_00000003", "update_00000004", "update_00000012"]


def test_a_restored_state_is_the_saved_one_to_the_bit(tmp_path, state):
    save(state, tmp_path, 1)
    before = everything(state)
    update(state, 1)
    assert {"0/theta/logits", "1/theta/logits", "0/optimizer/logits/exp_avg"} <= set(different(everything(state), before))
    assert any("lora_" in name for name in different(everything(state), before))
    restore(state, newest(tmp_path, state))
    assert different(everything(state), before) == []


def test_a_rank_of_another_layout_restores_its_particles_by_their_ids(tmp_path, state):
    path = save(state, tmp_path, 1)
    other = build_state(state.config, Layout.of(2, world_size=2, rank=1), torch.device("cpu"))
    restore(other, newest(tmp_path, state))
    assert [particle.id for particle in other.particles] == [1]
    expected = read_tensors(path / "particles" / "0001.safetensors")["theta/logits"]
    assert torch.equal(other.particles[0].theta.logits, expected)
    assert not torch.equal(expected, read_tensors(path / "particles" / "0000.safetensors")["theta/logits"])


def assert_only_whole(folder, state, update):
    assert [path.name for path in folder.iterdir() if path.is_dir()] == [f"update_{update:08d}"]
    assert newest(folder, state).update == update


def test_a_refused_write_is_told_and_leaves_the_earlier_checkpoint_whole(tmp_path, state):
    save(state, tmp_path, 1)
    message = r"of update 2 could not be written \(rank 0: .*free space and use --resume"
    with largest_file(4096), pytest.raises(CheckpointError, match=message):
        save(state, tmp_path, 2)
    assert_only_whole(tmp_path, state, 1)
    save(state, tmp_path, 2)
    assert newest(tmp_path, state).update == 2


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_told_and_leaves_the_earlier_checkpoint_whole(small_disk, state):
    folder = small_disk / "checkpoints"
    saved = save(state, folder, 1)
    needed = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    free = shutil.disk_usage(small_disk).free
    assert needed < free, "the disk must hold a second checkpoint when it is empty"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(free - needed // 2))
    with pytest.raises(CheckpointError, match="of update 2 could not be written"):
        save(state, folder, 2)
    assert_only_whole(folder, state, 1)
    ballast.unlink()
    save(state, folder, 2)
    assert newest(folder, state).update == 2


def test_no_room_for_the_manifest_alone_makes_no_checkpoint(small_disk, state):
    folder = small_disk / "checkpoints"
    saved = save(state, folder, 1)
    page = 4096  # tmpfs gives files whole pages
    needed = sum(-(-path.stat().st_size // page) * page for path in saved.rglob("*.safetensors"))
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - needed))
    with pytest.raises(CheckpointError, match=r"rank 0: .*No space left"):
        save(state, folder, 2)
    assert_only_whole(folder, state, 1)
