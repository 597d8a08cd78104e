"""`dist-vsd bench update`: a real smallest measurement, counting at real size, the published way, and what it refuses."""

import json
import mmap

import pytest
import torch

from dist_vsd.commands.bench import run
from dist_vsd.config_files import load_preset, merge
from dist_vsd.device import peak_memory_mib, reset_peak_memory
from dist_vsd.scaling import peaks
from dist_vsd.scaling.as_published import SECOND_BRANCH, published_ways
from dist_vsd.scaling.update_bench import Way, count_way

CPU = torch.device("cpu")
TINY = ["update", "--size", "tiny", "--num-updates", "2", "--num-warmup", "1"]
TINY_FIELD = ["--", "--field.num-samples", "8", "--field.dense-grid.resolutions", "8"]
# A picture costs nothing to render: the networks' operations are left.
PICTURE = ["--", "--representation", "image", "--image.resolution", "512", "--regularization.reconstruction", "0"]


@pytest.fixture
def small_peaks(monkeypatch):
    monkeypatch.setattr(peaks, "SIDES", {True: 64, False: 64})
    monkeypatch.setattr(peaks, "COPIED_BYTES", {True: 2**16, False: 2**16})


def test_an_update_is_timed_counted_and_compared_with_the_published_way(tmp_path, capsys, small_peaks):
    pytest.importorskip("matplotlib")
    words = [*TINY, "--num-particles", "2", "--as-published", "--out", str(tmp_path / "new"), *TINY_FIELD]
    assert run(words) == 0
    record, printed = json.loads((tmp_path / "new" / "update.json").read_text()), capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["update.json", "update.png"]
    assert [row["name"] for row in record["rows"]] == ["dist_vsd", "thu-ml", "threestudio"]
    assert [row["particles_per_update"] for row in record["rows"]] == [2, 1, 1]
    for row in record["rows"]:
        assert row["particle_updates_per_second"] == pytest.approx(row["particles_per_update"] / row["seconds_per_update"])
        assert row["flop"] == sum(row["flop_by_stage"].values())
        peak = record["peaks"][row["precision"]]
        assert row["share_of_matmul_peak"] == pytest.approx(row["flop"] / row["seconds_per_update"] / peak["matmul_flop_per_second"])
        assert row["share_of_copy_peak"] == pytest.approx(row["bytes"] / row["seconds_per_update"] / peak["copy_bytes_per_second"])
        assert set(row["stage_ms"]) == {"render", "scores", "backward", "phi"}
        assert all(milliseconds > 0 for milliseconds in row["stage_ms"].values())
        assert row["peak_memory_mib"] > 1
    assert record["machine"]
    assert "particle-updates/s" in printed
    assert printed.count("not as the originals: ") == len(record["differs_from_the_originals"]) > 0


def test_stable_diffusions_size_is_counted_without_a_machine_that_could_hold_it(tmp_path, capsys):
    assert run(["update", "--size", "sd21", "--count-only", "--out", str(tmp_path), *PICTURE, "--score.reuse-pass"]) == 0
    (row,) = json.loads((tmp_path / "update.json").read_text())["rows"]
    assert 5.55e12 < row["flop"] <= 5.6e12
    assert (row["precision"], row["render_size"]) == ("bf16", 512)
    assert "seconds_per_update" not in row
    assert "ms an update" not in capsys.readouterr().out


def ways(num_particles=2, **settings):
    values = {"prompt": "a duck", "prior": "random:tiny", "num_particles": num_particles, "num_views": 1, "render_size": 16}
    config = merge(load_preset("image"), values | {"regularization": {"reconstruction": 0.0}, "precision": "bf16"} | settings, "test")
    return [Way(name="dist_vsd", config=config), *published_ways(config, can_fp16=True, has_real_size=False)]


def test_the_published_way_makes_one_particle_an_update_with_passes_of_its_own_for_phi():
    ours, thu_ml, threestudio = (way.config for way in ways(score={"reuse_pass": True}))
    for config in (thu_ml, threestudio):
        assert (config.particles.theta_batch, config.particles.phi_batch, config.micro_batch_size) == (1, 1, 1)
        assert not config.score.reuse_pass
        assert config.score.prior == ours.prior  # a UNet of its own
    assert (thu_ml.precision, threestudio.precision) == ("fp32", "fp16")
    assert threestudio.score.entropy_weight == SECOND_BRANCH


def test_the_published_way_costs_what_is_taken_back_and_threestudio_another_branch_of_phi():
    ours, thu_ml, threestudio = (count_way(way) for way in ways(num_particles=1))
    # Keys and values of 77 tokens, 16 wide, of 3 blocks 8 wide and one of 16, in 4 rows: eps_uncond, eps_cond, eps_phi, phi's own pass.
    assert thu_ml["flop"] - ours["flop"] == 4 * (3 * 8 + 16) * (2 * 2 * 77 * 16)
    passes = thu_ml["flop_by_stage"]["scores"] / 3
    assert threestudio["flop"] - thu_ml["flop"] == pytest.approx(passes, rel=0.1)  # and LoRA beside it
    assert threestudio["num_operations"] > thu_ml["num_operations"] > ours["num_operations"]


def test_at_real_size_rays_have_the_originals_numbers_of_samples():
    config = load_preset("stable-diffusion")
    thu_ml, threestudio = (way.config.field for way in published_ways(config, can_fp16=True, has_real_size=True))
    assert (thu_ml.num_samples, threestudio.num_samples) == (96, 512)
    assert thu_ml.occupancy_threshold < 0 < threestudio.occupancy_threshold


def test_peaks_are_operations_and_bytes_over_the_median_time(monkeypatch, small_peaks):
    monkeypatch.setattr(peaks, "median_seconds", lambda work, _device: (work(), 0.5)[1])
    found = peaks.measure_peaks(CPU, torch.float32)
    assert (found.matmul_flop_per_second, found.copy_bytes_per_second) == (2 * 64**3 / 0.5, 2 * 2**16 / 0.5)


def test_the_first_time_does_not_count(monkeypatch):
    clock = iter([0.0, 100.0, *(t for _ in range(peaks.REPEATS) for t in (0.0, 2.0))])
    monkeypatch.setattr(peaks.time, "perf_counter", lambda: next(clock))
    assert peaks.median_seconds(lambda: None, CPU) == 2.0


def test_the_peak_of_memory_begins_anew():
    def take_and_give_back():
        with mmap.mmap(-1, 100 * 2**20) as block:  # the system's own: torch's allocator may keep what is freed
            block.write(bytes(100 * 2**20))

    take_and_give_back()
    before = peak_memory_mib(CPU)
    reset_peak_memory(CPU)
    assert peak_memory_mib(CPU) < before - 50
    take_and_give_back()
    assert peak_memory_mib(CPU) > before - 50


BAD = {
    "updat": ("bench 'updat' does not exist (did you mean update?)",),
    "update --size sd22": ("--size must be one of embedded, sd15, sd21, sdxl, tiny, sd3-medium", "did you mean sd21"),
    "update --num-particles 0": ("--num-particles must be at least 1, got 0",),
    "update --num-warmup -1": ("--num-warmup must be 0 or more, got -1",),
    "update --precision fp8": ("--precision must be one of fp32, bf16, fp16, got 'fp8'",),
    "update --attention flahs": ("--attention must be one of sdpa, xformers, flash", "did you mean flash"),
    "update --compile regoins": ("--compile must be one of off, regions, graphs", "did you mean regions"),
    "update -- --compile regions": ("--compile can't stand after --", "before the --"),
    "update --preset embeded": ("preset 'embeded' does not exist (did you mean embedded",),
    "update -- --num-updates 3": ("--num-updates can't stand after --",),
    "update -- --precision bf16": ("--precision can't stand after --", "before the --"),
    "update -- --score.rank 0": ("score.rank must be at least 1, got 0",),
    "update --as-published -- --objective sds": ("--as-published is VSD's update, got objective sds",),
    "update --out file": ("--out 'file' can't be written", "is a file"),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_told_in_a_line_and_nothing_is_written(words, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("taken")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as told:  # noqa: PT011 - the message is checked below
        run(words.split())
    assert all(part in str(told.value) for part in BAD[words]), told.value
    assert "\n" not in str(told.value)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("words", "reason"),
    [("--precision fp16", "fp16 needs a GPU"), ("--attention flash", "want a GPU"), ("--compile graphs", "want a GPU")],
)
def test_what_wants_a_gpu_is_refused_without_one(words, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=reason):
        run(["update", *words.split()])
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_around_it_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="run it without the launcher"):
        run(["update"])
