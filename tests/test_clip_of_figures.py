"""The CLIP that figures are told by: named by --clip, in the loop as well; else beside the prior; else said once to be missing."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from dist_vsd.cli import main
from dist_vsd.priors.clip_folder import EMBEDDED_CLIP_FOLDER, clip_beside, clip_for, find_clip
from dist_vsd.priors.pipeline_folder import EMBEDDED_FOLDER
from tests.runs import TINY

SMALL = ["a green duck", *TINY, "--objective", "sds", "--representation", "image", "--image.resolution", "8", "--wandb.mode", "disabled"]
SMALL += ["--preview-every", "2"]


@pytest.fixture(scope="module")
def blind_prior(tmp_path_factory):
    """The embedded prior without the CLIP beside it, as Stable Diffusion's folders are."""
    folder = tmp_path_factory.mktemp("prior") / "blind"
    shutil.copytree(EMBEDDED_FOLDER, folder, ignore=shutil.ignore_patterns("clip", "*.png"))
    return folder


def rows_of(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def figures_of(run_dir):
    return {row["update"]: row["clip/score"] for row in rows_of(run_dir) if "clip/score" in row}


@pytest.fixture(scope="module")
def runs(blind_prior, tmp_path_factory):
    """The same run without a CLIP, and with one that is named."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", *SMALL, "--prior", str(blind_prior), "--run-dir", str(folder / "without")]) == 0
    words = ["--prior", str(blind_prior), "--clip", str(EMBEDDED_CLIP_FOLDER), "--run-dir", str(folder / "with")]
    assert main(["train", *SMALL, *words]) == 0
    return folder


def test_without_a_clip_the_loop_says_once_that_its_figures_are_missing(runs):
    events = [row["event"] for row in rows_of(runs / "without") if "event" in row]
    told = [event for event in events if "no figures by CLIP" in event]
    assert len(told) == 1, events
    assert "give --clip FOLDER, or a hub id" in told[0]
    assert figures_of(runs / "without") == {}


def test_with_a_clip_that_is_named_the_loop_has_its_figures(runs):
    assert set(figures_of(runs / "with")) == {2, 4, 6, 8}
    assert not [row for row in rows_of(runs / "with") if "no figures by CLIP" in row.get("event", "")]
    assert f"evaluate_clip: {EMBEDDED_CLIP_FOLDER}" in (runs / "with" / "config.yaml").read_text()


def test_a_clip_may_be_named_when_a_run_goes_on(runs, tmp_path):
    shutil.copytree(runs / "without", tmp_path / "run")
    words = ["--resume", "--num-updates", "10", "--clip", str(EMBEDDED_CLIP_FOLDER), "--run-dir", str(tmp_path / "run")]
    assert main(["train", *words]) == 0
    assert set(figures_of(tmp_path / "run")) == {10}


def test_evaluate_takes_the_runs_own_clip_and_says_once_where_there_is_none(runs, tmp_path, capsys):
    for name in ("with", "without"):
        shutil.copytree(runs / name, tmp_path / name)
    assert main(["evaluate", str(tmp_path / "with"), "--metrics", "clip"]) == 0
    assert "no figures by CLIP" not in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "with"), str(tmp_path / "without")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("no figures by CLIP of") == 1
    figures = {name: json.loads((tmp_path / name / "evaluation.json").read_text())["figures"] for name in ("with", "without")}
    assert "clip/score" in figures["with"]
    assert "clip/score" not in figures["without"]
    assert main(["evaluate", str(tmp_path / "without"), "--metrics", "clip", "--clip", str(EMBEDDED_CLIP_FOLDER)]) == 0


def test_a_clip_of_the_hub_is_found_in_its_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--clip"
    shutil.copytree(EMBEDDED_CLIP_FOLDER, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert find_clip("someone/clip") == repository / "snapshots" / ("0" * 40)
    with pytest.raises(ValueError, match="CLIP 'someone/other' is neither a folder here nor to be had from the hub"):
        find_clip("someone/other")


def test_the_clip_beside_a_prior_is_the_default(blind_prior, tmp_path):
    assert clip_for("embedded", "") == EMBEDDED_CLIP_FOLDER
    assert clip_beside(str(blind_prior)) is None
    shutil.copytree(EMBEDDED_CLIP_FOLDER, tmp_path / "clip")
    assert clip_beside(str(tmp_path)) == tmp_path / "clip"
    assert clip_for(str(blind_prior), str(tmp_path / "clip")) == tmp_path / "clip"



def remove_tokenizer(folder):
    for file in [file for file in folder.iterdir() if file.name.startswith(("token", "vocab", "merge"))]:
        file.unlink()


DAMAGES = {
    "absent": (lambda folder: shutil.rmtree(folder), "is not a folder: give --clip the folder of a CLIPModel, or a hub id"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "is incomplete"),
    "of another kind": (lambda folder: (folder / "config.json").write_text('{"model_type": "dinov2"}'), "is a dinov2"),
    "no moments": (lambda folder: (folder / "preprocessor_config.json").write_text("{}"), "lacks image_mean"),
    "no tokenizer": (remove_tokenizer, "incomplete"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
}


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize(("damage", "fragment"), DAMAGES.values(), ids=DAMAGES)
def test_a_clip_that_cannot_be_used_is_refused_before_the_work(tmp_path, runs, damage, fragment, command, capfd):
    shutil.copytree(EMBEDDED_CLIP_FOLDER, tmp_path / "clip")
    damage(tmp_path / "clip")
    words = [str(runs / "without")] if command == "evaluate" else [*SMALL, "--run-dir", str(tmp_path / "run")]
    assert main([command, *words, "--clip", str(tmp_path / "clip")]) == 2
    errors = capfd.readouterr().err
    assert len(errors.splitlines()) == 1, errors
    assert fragment in errors
    assert not (tmp_path / "run").exists()


def test_the_flag_and_the_section_of_the_objective_stand_beside_each_other(tmp_path, capfd):
    words = ["--clip", str(tmp_path / "absent"), "--clip.num-crops", "3", "--run-dir", str(tmp_path / "run")]
    assert main(["train", *SMALL, *words]) == 2
    assert f"CLIP '{tmp_path / 'absent'}' is not a folder" in capfd.readouterr().err
