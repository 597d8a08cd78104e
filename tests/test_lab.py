"""`dist-vsd lab`: what it writes, that finished runs are kept, its mixtures, and what it refuses."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch

from dist_vsd.cli import main
from dist_vsd.lab import runs
from dist_vsd.lab.mixtures import MIXTURES, load_mixture
from dist_vsd.lab.pictures import color_of, representatives
from dist_vsd.lab.settings import Variant
from dist_vsd.runs.stop_request import STOP_SIGNALS
from tests.runs import environment
from tests.warm_python import python

SMALL = ["--num-particles", "12", "--num-updates", "6", "--no-pictures"]
FULL = """components:
- {weight: 0.75, mean: [1, 0, 0], std: 0.5}
- {weight: 0.25, mean: [0, 2, 0], covariance: [[1.0, 0.8, 0], [0.8, 1.0, 0], [0, 0, 1.0]]}
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A current folder of its own; signal handlers are put back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dist_vsd.lab.measures.NUM_TARGET_SAMPLES", 256)  # for speed; these figures are not looked at
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def lab(*words):
    """Run the command on a few particles, without pictures unless they are asked for."""
    return main(["lab", *SMALL, *words])


def test_every_combination_is_a_run_and_all_are_in_the_summary(capfd):
    words = ["--phi", "exact", "learned", "--phi-steps", "1", "2", "--order", "theta_then_phi", "phi_then_theta", "--seed", "0", "3"]
    assert lab(*words) == 0
    record = json.loads(Path("lab/lab.json").read_text())
    learned = [f"vsd-learned-{steps}-{order}" for order in ("theta_then_phi", "phi_then_theta") for steps in (1, 2)]
    assert [row.get("variant") for row in record["rows"]] == [None, "denoising", "sds", "vsd-exact", *learned]
    assert all(row["seeds"] == [0, 3] for row in record["rows"][1:])
    assert record["settings"]["num_particles"] == 12
    energy = record["rows"][3]["figures"]["energy_distance"]
    assert energy["low"] < energy["mean"] < energy["high"]
    assert "mean_phi_gap" in record["rows"][4]["figures"]
    assert len(list(Path("lab/runs").iterdir())) == 14
    printed = capfd.readouterr().out
    assert "VSD, 2 phi steps, phi first" in printed
    assert "fresh samples" in printed


def test_a_flow_is_a_comparison_of_its_own(capfd):
    assert lab("--methods", "sds", "vsd", "--phi", "exact", "learned", "--process", "rectified_flow", "--shift", "2", "--pictures") == 0
    record = json.loads(Path("lab/lab.json").read_text())
    assert (record["settings"]["process"], record["settings"]["shift"]) == ("rectified_flow", 2)
    assert "12 particles, 6 updates, rectified flow with shift 2" in capfd.readouterr().out
    assert Path("lab/four_gaussians.png").exists()
    for words, rule in ((("--process", "rectified_flow"), "with shift 2.0, not 3.0"), ((), "with process rectified_flow, not variance_")):
        assert lab("--methods", "sds", *words) == 2
        assert rule in capfd.readouterr().err.splitlines()[-1]


def test_results_that_do_not_name_a_process_are_of_the_only_one_that_there_was(capfd):
    assert lab("--methods", "sds") == 0
    result = Path("lab/runs/four_gaussians-sds-seed0/result.json")
    content = json.loads(result.read_text())
    del content["asked"]["process"]
    result.write_text(json.dumps(content))
    assert lab("--methods", "sds", "--shift", "5") == 0  # which this process has not
    assert "1 of 1 runs are finished" in capfd.readouterr().err
    assert lab("--methods", "sds", "--process", "rectified_flow") == 2


def test_a_run_keeps_figures_and_particles_over_updates():
    assert lab("--methods", "sds") == 0
    folder = Path("lab/runs/four_gaussians-sds-seed0")
    lines = runs.read_metrics(folder)
    assert [line["update"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert set(lines[0]) == {"update", "energy_distance", "mode_weights", "mode_weight_error", "in_mode_std", "kl", "kl_noised"}
    assert sum(lines[0]["mode_weights"]) == pytest.approx(1)
    theta, updates = runs.read_trajectory(folder)
    assert theta.shape == (7, 12, 2)
    assert updates == [line["update"] for line in lines]
    assert json.loads((folder / "result.json").read_text())["figures"]["kl"] == lines[-1]["kl"]


def test_finished_runs_are_not_run_again_and_damaged_ones_are(capfd):
    assert lab() == 0
    times = {file: file.stat().st_mtime_ns for file in Path("lab/runs").glob("*/result.json")}
    damaged = Path("lab/runs/four_gaussians-sds-seed0/result.json")
    damaged.write_text(damaged.read_text()[:-20])
    assert lab("--seed", "0", "1") == 0
    assert "2 of 6 runs are finished in lab" in capfd.readouterr().err
    changed = [file for file, then in times.items() if file.stat().st_mtime_ns != then]
    assert changed == [damaged]


def test_a_stopped_comparison_goes_on_with_the_run_that_was_not_finished():
    words = ["lab", "--methods", "denoising", "sds", "--num-particles", "64", "--num-updates", "4000", "--no-pictures"]
    process = subprocess.Popen([python(), "-m", "dist_vsd", *words], env=environment(), stderr=subprocess.PIPE, text=True)
    unfinished = Path("lab/runs/four_gaussians-denoising-seed0/metrics.jsonl")
    begin = time.monotonic()
    while not unfinished.exists() and time.monotonic() - begin < 60:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert errors.splitlines()[-1] == "stopped by SIGINT: finished runs are in lab, the same command goes on"
    assert not unfinished.with_name("result.json").exists()
    assert not Path("lab/lab.json").exists()


def test_each_mixture_has_its_picture_whatever_its_dimensions():
    Path("line.json").write_text('{"components": [{"weight": 1, "mean": [1], "std": 0.5}]}')
    assert lab("--mixture", "ring", "line.json", "sixteen_dimensions", "--phi", "exact", "learned", "--pictures") == 0
    for name in ("ring", "line", "sixteen_dimensions"):
        picture = iio.imread(f"lab/{name}.png")
        assert min(picture.shape[:2]) > 400
        assert (picture[0, 0, :3] == 255).all()  # a light background


def test_without_matplotlib_the_rest_is_written(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "dist_vsd.lab.pictures", raising=False)
    assert lab("--methods", "sds", "--pictures") == 0
    assert "no pictures: matplotlib is not installed" in capfd.readouterr().err
    assert Path("lab/lab.json").exists()


def test_a_picture_has_a_column_for_each_method_and_for_fewest_and_most_phi_steps():
    learned = [Variant("vsd", "learned", steps, order) for order in ("theta_then_phi", "phi_then_theta") for steps in (5, 1, 2)]
    variants = [Variant("sds"), Variant("vsd", "exact"), *learned]
    assert representatives(variants) == [Variant("sds"), Variant("vsd", "exact"), learned[1], learned[0]]
    assert len({color_of(variant, variants) for variant in variants}) == 5  # both orders of a number of steps have one colour


@pytest.mark.parametrize("name", MIXTURES)
def test_the_named_mixtures_have_densities_that_integrate_to_one_on_each_pair_of_axes(name):
    flat = load_mixture(name).marginal((0, 1))
    grid = torch.linspace(-8, 8, 321)
    assert float(flat.log_density(torch.cartesian_prod(grid, grid)).exp().sum()) * 0.05**2 == pytest.approx(1, abs=1e-3)


def test_a_mixture_from_a_file_has_its_numbers():
    Path("mine.yaml").write_text(FULL)
    prior = load_mixture("mine.yaml")
    assert prior.means.tolist() == [[1, 0, 0], [0, 2, 0]]
    assert prior.weights.tolist() == [0.75, 0.25]
    torch.testing.assert_close(prior.covariances[0], 0.25 * torch.eye(3))
    assert prior.covariances[1, 0, 1] == pytest.approx(0.8)


def component(**changes):
    return {"weight": 1, "mean": [0, 0], "std": 1} | changes


FILES = {
    "sum.json": {"components": [component(weight=0.5), component(weight=0.3)]},
    "indefinite.json": {"components": [{"weight": 1, "mean": [0, 0], "covariance": [[1, 2], [2, 1]]}]},
    "uneven.json": {"components": [component(weight=0.5), component(weight=0.5, mean=[0, 0, 0])]},
    "rows.json": {"components": [{"weight": 1, "mean": [0, 0], "covariance": [[1, 0]]}]},
    "both.json": {"components": [component(covariance=[[1, 0], [0, 1]])]},
    "unknown.json": {"components": [component(sigma=1)]},
    "text.json": {"components": [component(mean="here")]},
    "narrow.json": {"components": [component(std=-1)]},
    "empty.json": {"components": []},
    "other.json": {"components": [component()], "name": "x"},
    "list.json": [1, 2],
}
BAD = {
    "--mixture sum.json": ("sum.json: a mixture's weights must sum to 1, got 0.8", "divide"),
    "--mixture indefinite.json": ("indefinite.json", "positive definite", "component 0"),
    "--mixture uneven.json": ("component 1: mean must have as many numbers as the first's, 2, got 3",),
    "--mixture rows.json": ("component 0: covariance must have 2 rows of 2 numbers",),
    "--mixture both.json": ("component 0 must have one of std and covariance",),
    "--mixture unknown.json": ("component 0 has the unknown key 'sigma'",),
    "--mixture text.json": ("component 0: mean must be a list of numbers, got 'here'",),
    "--mixture narrow.json": ("component 0: std must be above 0, got -1",),
    "--mixture empty.json": ("must hold a list of components",),
    "--mixture other.json": ("must hold a list of components and nothing else",),
    "--mixture list.json": ("must hold a list of components",),
    "--mixture broken.json": ("broken.json: it is not valid JSON",),
    "--mixture broken.yaml": ("broken.yaml: it is not valid YAML",),
    "--mixture absent.yaml": ("absent.yaml: it can't be read (FileNotFoundError)",),
    "--mixture rings": ("mixture 'rings' does not exist (did you mean ring?)", "four_gaussians"),
    "--mixture sum.json a/sum.json": ("must name different mixtures",),
    "--methods vdsd": ("--methods must be some of denoising, sds, vsd, got 'vdsd'", "did you mean vsd"),
    "--methods": ("--methods must hold at least one value",),
    "--methods sds sds": ("each once, got sds sds",),
    "--phi exat": ("--phi must be some of exact, learned, got 'exat'",),
    "--order phi_first": ("--order must be some of theta_then_phi, phi_then_theta",),
    "--phi-steps 0": ("--phi-steps must be at least 1, got 0",),
    "--seed -1": ("--seed must be at least 0, got -1",),
    "--num-particles 0": ("num_particles must be at least 1, got 0", "--num-particles"),
    "--num-updates -5": ("num_updates must be at least 1, got -5", "--num-updates"),
    "--lr nan": ("lr must be above 0 and at most 1000, got nan",),
    "--phi-lr 1e38": ("phi_lr must be above 0 and at most 1000, got 1e+38",),
    "--start-std 0": ("start_std must be above 0", "got 0.0"),
    "--num-particles 5": ("the measure kl needs at least 6 particles", "got 5", "leave kl out of --measures"),
    "--measures energy": ("measure 'energy' does not exist", "energy_distance"),
    "--process flow": ("process must be one of variance_preserving, rectified_flow, got 'flow'", "--process"),
    "--process rectified_flow --shift 0": ("shift must be a positive number, got 0.0", "--shift"),
    "--process rectified_flow --shift nan": ("shift must be a positive number, got nan",),
    "--process rectified_flow --guidance-scale 2": ("guidance_scale 2 needs the embedding", "use 1"),
    "--guidance-scale 7.5": ("guidance_scale 7.5 needs the embedding", "use 1"),
    "--out list.json": ("--out 'list.json' can't be written", "choose another"),
    "--timesteps.annealing cosine": ("timesteps.annealing must be one of", "'cosine'"),
}


@pytest.mark.parametrize(("words", "fragments"), BAD.items(), ids=BAD)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(words, fragments, capfd):
    for name, content in FILES.items():
        Path(name).write_text(json.dumps(content))
    for name in ("broken.json", "broken.yaml"):
        Path(name).write_text("{components: [")
    before = sorted(Path.cwd().rglob("*"))
    assert main(["lab", *shlex.split(words)]) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith("dist-vsd: error: ")
    for fragment in fragments:
        assert fragment in errors
    assert sorted(Path.cwd().rglob("*")) == before


def test_runs_of_other_settings_are_not_taken_for_finished(capfd):
    assert lab("--methods", "sds") == 0
    assert lab("--methods", "sds", "--lr", "0.01") == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "four_gaussians-sds-seed0 was run with lr 0.03, not 0.01: choose another --out, or ask for the same" in error


def test_a_particle_that_is_lost_fails_the_run(capfd):
    assert lab("--methods", "sds", "--start-std", "1e30") == 1
    assert "a particle is not finite after update" in capfd.readouterr().err
    assert not Path("lab/lab.json").exists()
