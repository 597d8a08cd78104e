"""Memory at its end: one line that says what would fit, exit code 1, and 2 where it can be foretold; checkpoints stay."""

import json
import re
import resource
import subprocess

import numpy as np
import psutil
import pytest
import torch

from dist_vsd.cli import main
from dist_vsd.commands.estimate import layout_table
from dist_vsd.config import MOST_PARTICLES, RunConfig
from dist_vsd.config_files import load_preset
from dist_vsd.distributed.layout import Layout
from dist_vsd.errors import OutOfMemory, RunFailed, is_out_of_memory
from dist_vsd.runs.outcome import read_outcome
from dist_vsd.scaling.cost_model import Sizes
from dist_vsd.scaling.counted_memory import CountedMemory
from dist_vsd.scaling.fit import Needs, RenderBytes, SizeFlag, largest, measure_render, one_particle
from dist_vsd.scaling.memory import GIB, MIB, Memory, cgroup_limits, telling_out_of_memory
from tests.ranks import run_ranks
from tests.runs import TINY, environment
from tests.warm_python import python

ENOUGH = Memory(total=100 * GIB, free=50 * GIB, where="main memory")
PICTURES = ["--representation", "image", "--image.resolution", "8", "--objective", "sds", "--no-turntables", "--wandb.mode", "disabled"]


def run_within(num_bytes, *words):
    """Run the command line in a process that may have no more address space than this."""

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))

    command = [python(), "-m", "dist_vsd", *map(str, words)]
    return subprocess.run(command, env=environment(), preexec_fn=limit, capture_output=True, text=True, timeout=300)


def test_a_run_out_of_memory_says_in_one_line_what_fits_and_that_fits(tmp_path):
    words = ["train", "a green duck", "--num-updates", 1, "--no-turntables", "--wandb.mode", "disabled", "--preview-every", 1]
    done = run_within(4 * GIB, *words, "--render-size", 800, "--run-dir", tmp_path / "large")
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    told = r"dist-vsd: failed: out of memory \(asked for [\d.]+ [GM]iB at once; [\d.]+ GiB of main memory were free\): "
    assert re.match(told, done.stderr)
    outcome = read_outcome(tmp_path / "large")
    assert outcome.exit_code == 1
    assert f"failed: {outcome.error}" in done.stderr
    size = re.search(r"it fits with --render-size (\d+)", done.stderr)[1]
    again = run_within(4 * GIB, *words, "--render-size", size, "--run-dir", tmp_path / "small")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_rank_out_of_memory_is_named_and_what_was_saved_stays(tmp_path, num_ranks, monkeypatch):
    monkeypatch.setenv("DIST_VSD_LOST_AFTER_SECONDS", "6")
    words = ["a green duck", *TINY, *PICTURES, "--run-dir", str(tmp_path / "run")]
    code, output = run_ranks(words, num_ranks, fault=("memory_ends", str(num_ranks - 1)))
    assert code == 1
    assert "Traceback" not in output
    name = "rank 1 ran out of memory" if num_ranks == 2 else "failed: out of memory"
    assert f"{name} (asked for 262,144.0 GiB at once; " in output
    assert "Update 4 is saved" in output
    outcome = read_outcome(tmp_path / "run")
    assert (outcome.exit_code, outcome.update) == (1, 4)
    assert name.removeprefix("failed: ") in outcome.error
    if num_ranks == 2:
        assert "dist-vsd: failed: rank 1 failed: " in output  # what rank 0 says
    again, output = run_ranks(["--resume", "--run-dir", str(tmp_path / "run")], num_ranks)
    assert again == 0, output


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["--render-size", "100000"], ("--render-size 100000: one render can't fit", "by the estimate it fits with --render-size ")),
        (["--num-particles", "1000000"], ("--num-particles 1000000: the particles of a rank can't fit", "with --num-particles ")),
        (["--num-particles", "1000000", "--dry-run"], ("takes at least 5,645.2 GiB",)),  # 1e6 x 505,124 x 12 bytes
        (["--num-particles", "100000000"], ("num_particles must be at most 1,000,000, got 100000000", "lower --num-particles")),
        (["--num-particles", "100000000", "--dry-run"], ("num_particles must be at most 1,000,000",)),
        (["--num-views", "100000000", "--dry-run"], ("num_views must be at most 1,000,000",)),
        (["--field.dense-grid.resolutions", "100000"], ("not even one particle fits into memory: lower the sizes of --field",)),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_before_the_work(tmp_path, capfd, words, fragments):
    code = main(["train", "a green duck", *words, "--run-dir", str(tmp_path / "run")])
    output, errors = capfd.readouterr()
    assert (code, output) == (2, ""), errors
    assert len(errors.splitlines()) == 1, errors
    for fragment in fragments:
        assert fragment in errors
    assert not (tmp_path / "run").exists()


def test_a_run_of_many_particles_is_estimated_by_a_few(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "a green duck", *PICTURES, "--num-particles", "20000", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "particle(s) 0-19999, view(s) 0" in printed
    assert "of 8 particle(s) with 1 view(s), and in proportion" in printed
    assert re.search(r"theta +58\.6 +\(of a particle: 192 numbers\)", printed)  # 20000 x 192 x 16 bytes, MiB
    assert list(tmp_path.iterdir()) == []


def test_a_layout_of_a_hundred_million_particles_is_written_in_ranges():
    table = layout_table(Layout.of(10**8, 4))
    assert "rank 3: shard 3, particle(s) 75000000-99999999, view(s) 0" in table
    assert "rank 0: shard 0, particle(s) 0, 1, view(s) 0" in layout_table(Layout.of(4, 2))
    assert MOST_PARTICLES < 10**8


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A finished run of one small picture."""
    folder = tmp_path_factory.mktemp("picture") / "run"
    assert main(["train", "a green duck", *PICTURES, "--num-particles", "1", "--num-updates", "1", "--run-dir", str(folder)]) == 0
    return folder


def test_pictures_that_cannot_fit_are_refused_with_the_size_that_does(picture, capfd, tmp_path):
    assert main(["render", str(picture), "--size", "1000000", "--out", str(tmp_path / "out")]) == 2
    errors = capfd.readouterr().err
    assert re.search(r"--size 1000000 can't fit, main memory has .* by the estimate --size \d+ fits", errors), errors
    assert not (tmp_path / "out").exists()


def test_samples_that_do_not_fit_end_in_one_line_with_the_number_that_does(tmp_path):
    words = ["prior", "sample", "a green duck", "--num-steps", 1, "--num-samples", 3000, "--out", tmp_path / "duck.png"]
    done = run_within(3 * GIB, *words)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(r"--num-samples 3000 is estimated to take [\d.]+ GiB; by the estimate --num-samples \d+ fits", done.stderr)


def test_main_memory_is_kept_to_what_was_free_so_that_the_system_need_not_kill():
    memory = Memory(total=GIB, free=GIB // 2, where="main memory", held=psutil.Process().memory_info().data)
    before, kept = resource.getrlimit(resource.RLIMIT_DATA), []
    told = pytest.raises(OutOfMemory, match=r"^out of memory \(.*; 0.5 GiB of main memory were free\): lower it$")
    with told, telling_out_of_memory(memory, lambda _memory: "lower it"):
        while len(kept) < 64:
            kept.append(torch.ones(32 * MIB // 4))  # each is small, and Linux would promise it
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15.77 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 800000000 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GiB)"),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
    ],
)  # fmt: skip
def test_what_libraries_say_of_no_memory_is_understood(error):
    assert is_out_of_memory(error)
    wrapped = ValueError("prior 'x' is damaged: its unet can't be loaded")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


def test_other_failures_and_those_that_were_told_are_left_alone():
    assert not is_out_of_memory(RuntimeError("shape '[2]' is invalid"))
    assert not is_out_of_memory(RunFailed("rank 1 failed: OutOfMemory: rank 1 ran out of memory"))
    with pytest.raises(KeyError), telling_out_of_memory(ENOUGH, lambda _memory: ""):
        raise KeyError("x")


def test_numpys_refusal_of_an_array_is_out_of_memory():
    with pytest.raises(MemoryError) as caught:
        np.zeros(2**60, np.uint8)
    assert is_out_of_memory(caught.value)


def test_live_bytes_are_counted_at_their_peak():
    with CountedMemory() as count:
        a = torch.zeros(1000)  # 4000
        b = a + 1  # 8000
        a.view(10, 100).add_(1)  # the same storage
        del a
        c = b.double()  # 4000 + 8000
        del b, c
    assert (count.peak_bytes, count.live_bytes) == (4096 + 8192, 0)  # blocks of 512 bytes


def test_a_tiny_render_foretells_a_larger_one():
    config = load_preset("embedded")
    theta = one_particle(config, torch.device("cpu"))
    line = measure_render(theta, config, with_gradient=False)
    from dist_vsd.cameras import turntable

    cameras = turntable(1, 15.0, sum(config.camera.distance) / 2, sum(config.camera.fov_deg) / 2)
    with torch.no_grad(), CountedMemory() as count:
        theta.render(cameras, 128)
    assert line.at(128) == pytest.approx(count.peak_bytes, rel=0.05)  # the share of rays that miss the cube differs by the size


def needs_of(num_particles=4, world_size=1, **options):
    """Needs in round numbers: 1 GiB a particle, 1 GiB of prior, and a render of 1 KiB a pixel."""
    config = RunConfig(prompt="x", num_particles=num_particles, **options)
    sizes = Sizes(GIB // 16, 0, float(GIB), None)
    return Needs(config, Layout.of(num_particles, world_size), sizes, RenderBytes(0.0, 1024.0))


def test_advice_names_the_largest_value_of_each_flag_that_fits():
    needs = needs_of(render_size=1024, micro_batch_size=4)  # 4 + 1 + 4 x 1 GiB
    assert needs.total() == 9 * GIB
    text = needs.advice(Memory(10 * GIB, int(7.5 * GIB / 0.7) + 1, "main memory"))
    # 2.5 GiB are left for four renders: 1024 sqrt(2.5 / 4) = 809.5 pixels; or for two and a half; or 2.5 particles at 2 GiB each
    # until a micro-batch is full, and one with 4 renders at 3.
    assert "estimated to need 9.0 GiB (prior 1.0 GiB, theta 4.0 GiB, activations 4.0 GiB)" in text
    assert text.endswith("it fits with --render-size 809 or with --micro-batch-size 2 or with --num-particles 3")


def test_advice_where_no_single_flag_is_enough_says_so():
    text = needs_of(render_size=1024).advice(Memory(10 * GIB, GIB // 2, "GPU 0"))
    assert "lower --num-particles, --render-size and --micro-batch-size together" in text


def test_advice_of_particles_is_over_all_ranks():
    text = needs_of(num_particles=8, world_size=4, render_size=16).advice(Memory(4 * GIB, 3 * GIB, "GPU 0"))
    assert "--num-particles 4" in text


def test_the_largest_that_fits_is_found_at_both_ends():
    assert [largest(most, lambda value: value <= 7) for most in (0, 3, 7, 100)] == [0, 3, 7, 7]
    assert largest(10, lambda _value: False) == 0
    assert "by the estimate --size 5 fits" in SizeFlag("--size", 10, lambda size: size * GIB).advice(ENOUGH)
    assert "give it more memory" in SizeFlag("--size", 10, lambda size: size * 99 * GIB).advice(ENOUGH)


def test_limits_of_control_groups_are_read_up_to_the_root(tmp_path):
    (tmp_path / "proc").write_text("12:memory:/slurm/job_1\n3:cpu:/x\n0::/user/step\n")
    files = {
        "memory/slurm/job_1/memory.limit_in_bytes": "1000", "memory/slurm/job_1/memory.usage_in_bytes": "400",
        "user/step/memory.max": "max", "user/step/memory.current": "7", "user/memory.max": "500", "user/memory.current": "100",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    assert cgroup_limits(tmp_path / "proc", tmp_path / "root") == [(1000, 600), (500, 400)]
    assert cgroup_limits(tmp_path / "absent") == []


def test_ranks_of_a_node_share_its_main_memory(monkeypatch):
    alone = Memory.of("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Memory.of("cpu").total == pytest.approx(alone.total / 4, rel=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_out_of_memory_ends_in_one_line(tmp_path, capfd):
    words = ["train", "a green duck", *TINY, "--wandb.mode", "disabled", "--render-size", "6000", "--run-dir", str(tmp_path / "run")]
    assert main(words) in (1, 2)
    assert "it fits with --render-size" in capfd.readouterr().err
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["exit_code"] == 1
