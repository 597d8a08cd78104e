"""`dist-vsd evaluate` on small real runs; and bad input: exit code 2, one line, nothing written."""

import csv
import json
import shutil

import pytest
import torch

from dist_vsd.cli import main
from dist_vsd.evaluation.evaluation import evaluate_run
from dist_vsd.evaluation.instruments import Instruments
from dist_vsd.evaluation.metric_names import METRICS
from dist_vsd.evaluation.prior_samples import PriorSamples
from dist_vsd.evaluation.views import capture, turns
from dist_vsd.priors.clip import ClipScorer
from dist_vsd.priors.clip_folder import EMBEDDED_CLIP_FOLDER
from dist_vsd.priors.pipeline_folder import EMBEDDED_FOLDER
from dist_vsd.runs.saved_run import open_run
from tests.runs import TINY

FEW = ["--num-azimuths", "4", "--sphere-subdivisions", "0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A 3D run of two particles, one of three pictures, and one on a prior that lies beside no CLIP."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", "a green duck", *TINY, "--num-updates", "2", "--run-dir", str(folder / "solid")]) == 0
    flat = ["a duck", "--preset", "image", "--num-updates", "1", "--num-particles", "3", "--run-dir", str(folder / "flat")]
    assert main(["train", *flat]) == 0
    shutil.copytree(EMBEDDED_FOLDER, folder / "prior", ignore=shutil.ignore_patterns("clip", "*.png", "dist_vsd.json"))
    plain = ["a duck", "--preset", "image", "--prior", str(folder / "prior"), "--num-updates", "1", "--num-particles", "1"]
    assert main(["train", *plain, "--run-dir", str(folder / "no-clip")]) == 0
    return folder


@pytest.fixture
def in_runs(runs, monkeypatch):
    monkeypatch.chdir(runs)
    for file in runs.glob("*/evaluation.json"):
        file.unlink()
    return runs


def test_a_run_in_3d_and_one_in_2d_are_evaluated_side_by_side(in_runs, capsys):
    assert main(["evaluate", "solid", "flat", *FEW, "--out", "tables/all.csv"]) == 0
    assert "mean" in capsys.readouterr().out
    solid, flat = (json.loads((in_runs / name / "evaluation.json").read_text()) for name in ("solid", "flat"))
    shared = {"clip/score", "clip/r_precision", "clip/quality_bits", "clip/variety_bits", "particles/diversity", "recognition/object"}
    shared.add("particles/finest_octave")
    in_3d = {"recognition/color", "recognition/view", "particles/multi_face_rate", "overlap/iou", "t3bench/quality"}
    assert solid["figures"].keys() == shared | in_3d
    assert flat["figures"].keys() == shared | {"recognition/color_bits", "recognition/view_bits"}
    assert (solid["update"], solid["num_particles"], solid["prompt"]) == (2, 2, "a green duck")
    assert [len(row) for row in solid["predictions"]["object"]] == [4, 4]
    assert [len(row) for row in flat["predictions"]["color"]] == [1, 1, 1]
    assert len(solid["by_particle"]["overlap/iou"]) == 2
    rows = list(csv.DictReader((in_runs / "tables" / "all.csv").open()))
    assert [row["run_dir"] for row in rows] == ["solid", "flat"]
    assert float(rows[0]["clip/score"]) == solid["figures"]["clip/score"]
    assert rows[1]["overlap/iou"] == ""


def test_what_is_asked_for_by_name_is_all_that_is_told(in_runs):
    words = ["flat", "--metrics", "samples", "fid", "--num-samples", "4", "--out", "all.json"]
    pytest.importorskip("torchmetrics")
    assert main(["evaluate", *words]) == 0
    found = json.loads((in_runs / "all.json").read_text())
    assert found["runs"][0]["figures"] == found["means"]
    names = {"color_bits", "color_distance", "view_bits", "view_distance", "diversity", "fid_clip"}
    names |= {"finest_octave", "nearest", "nearest_of_themselves"}
    assert found["means"].keys() == {f"samples/{name}" for name in names}
    assert found["means"]["samples/fid_clip"] > 0


def test_samples_of_the_prior_are_the_same_each_time_and_kept(in_runs):
    solid = PriorSamples(4, num_steps=2).of("embedded", "a duck", ["front view", "back view"])
    bank = PriorSamples(4, num_steps=2)
    again = bank.of("embedded", "a duck", ["front view", "back view"])
    assert torch.equal(again.pictures, solid.pictures)
    assert torch.equal(again.latents, solid.latents)
    assert bank.of("embedded", "a duck", ["front view", "back view"]) is bank.of("embedded", "a duck", ["front view", "back view"])
    assert not torch.equal(bank.of("embedded", "a duck", []).pictures, solid.pictures)


def test_a_clip_that_is_given_and_a_set_of_prompts_take_the_place_of_the_embedded_ones(in_runs):
    (in_runs / "two.txt").write_text("a red mug\n\na duck\n")
    words = ["no-clip", "flat", "--clip", str(EMBEDDED_CLIP_FOLDER), "--prompts", "two.txt", "--metrics", "r_precision", "entropy"]
    assert main(["evaluate", *words]) == 0
    for name in ("no-clip", "flat"):
        found = json.loads((in_runs / name / "evaluation.json").read_text())
        assert found["figures"].keys() == {"clip/r_precision", "clip/quality_bits", "clip/variety_bits"}
        assert {text for row in found["predictions"]["nearest"] for text in row} <= {"a red mug", "a duck"}
        assert found["figures"]["clip/variety_bits"] <= 1.0


def test_every_metric_stands_aside_where_it_has_no_meaning(in_runs):
    saved = open_run(in_runs / "no-clip")
    assert list(evaluate_run(saved, Instruments()).figures) == ["particles/finest_octave"]
    scorer = ClipScorer.load()
    assert list(evaluate_run(saved, Instruments(scorer=scorer)).figures) == ["clip/score", "particles/finest_octave"]
    pictures = capture(saved, turns(saved.config.camera, 4, (0.0,)))
    assert [picture.shape for picture in pictures] == [(1, 3, 64, 64)]
    assert {metric for metric in METRICS if not Instruments().missing(metric)} == {"overlap", "chamfer", "texture"}


BAD = {
    "evaluate": ("run", "dist-vsd evaluate --help"),
    "evaluate absent": ("run directory absent does not exist",),
    "evaluate solid prior": ("prior holds no run",),
    "evaluate solid --metrics clpi": ("--metrics must be out of", "'clpi'", "did you mean clip"),
    "evaluate flat --metrics lpips": ("metric lpips of flat needs weights", "--lpips FILE"),
    "evaluate flat --metrics dino": ("metric dino of flat needs weights", "--dino FOLDER"),
    "evaluate no-clip --metrics clip": ("metric clip of no-clip needs a CLIP", "--clip FOLDER"),
    "evaluate flat no-clip --metrics clip": ("metric clip of no-clip needs a CLIP",),
    "evaluate solid --metrics chamfer": ("metric chamfer needs meshes", "solid", "leave it out"),
    "evaluate flat --metrics overlap": ("metric overlap needs 3D particles", "flat", "leave it out"),
    "evaluate no-clip --metrics diversity --clip CLIP": ("metric diversity needs two particles",),
    "evaluate no-clip --metrics recognition --clip CLIP": ("needs the embedded prior and a prompt out of its captions",),
    "evaluate no-clip --metrics r_precision --clip CLIP": ("metric r_precision needs other prompts", "--prompts FILE"),
    "evaluate flat --prompts absent.txt": ("absent.txt can't be read", "FileNotFoundError"),
    "evaluate flat --prompts empty.txt": ("empty.txt must hold at least two prompts", "got 0"),
    "evaluate flat --prompts dragons.txt": ("does not know 'dragon'",),
    "evaluate flat --prompts long.txt": ("too long for the CLIP, which reads 16", "shorten"),
    "evaluate flat --clip prior": ("CLIP 'prior' is incomplete",),
    "evaluate flat --dino prior": ("DINO folder prior can't be loaded",),
    "evaluate flat --lpips empty.txt": ("LPIPS weights empty.txt can't be used",),
    "evaluate flat --elevations 100": ("--elevations must be", "[-90, 90]"),
    "evaluate flat --num-azimuths 0": ("--num-azimuths must be at least 1, got 0",),
    "evaluate flat --num-samples 1": ("--num-samples must be at least 2, got 1",),
    "evaluate flat --sphere-subdivisions 9": ("--sphere-subdivisions must be 0 to 3, got 9",),
    "evaluate flat --out all.txt": ("--out must end in .csv or .json", "'all.txt'"),
    "evaluate flat --out empty.txt/all.csv": ("empty.txt is a file",),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(words, in_runs, capsys):
    (in_runs / "empty.txt").write_text("\n")
    (in_runs / "dragons.txt").write_text("a dragon\na duck\n")
    (in_runs / "long.txt").write_text("a duck\n" + "a duck, " * 8 + "\n")
    before = sorted(in_runs.rglob("*"))
    assert main(words.replace("CLIP", str(EMBEDDED_CLIP_FOLDER)).split()) == 2
    # transformers, imported before the command could silence it, draws a progress bar besides.
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("dist-vsd"))
    for part in BAD[words]:
        assert part in line
    assert sorted(in_runs.rglob("*")) == before
