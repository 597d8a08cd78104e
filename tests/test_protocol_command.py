"""`dist-vsd evaluate --protocol` on a small real run: which files are there, what goes on, and what is refused in one line."""

import itertools
import json
import os
import shutil

import imageio.v3 as iio
import pytest

from dist_vsd.cli import main
from dist_vsd.evaluation.protocols.folders import BESIDE
from dist_vsd.particles.radiance_field import RadianceField
from dist_vsd.sweep.manifest import PlannedRun, SweepSettings, read_sweep, write_manifest, write_settings
from tests.runs import TINY

PROMPTS = ("a red mug", "a blue car", "a green duck")
GPTEVAL3D = ["--protocol", "gpteval3d", "--prompts", "prompts.json", "--size", "8"]
T3BENCH = ["--protocol", "t3bench", "--prompts", "prompt_single.txt", "--size", "4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A 3D run of one particle, a picture, and both benchmarks' files of prompts."""
    folder = tmp_path_factory.mktemp("runs")
    solid = ["a green duck", *TINY, "--num-updates", "1", "--num-particles", "1"]
    assert main(["train", *solid, "--run-dir", str(folder / "solid")]) == 0
    flat = ["a red mug", "--preset", "image", "--num-updates", "1", "--num-particles", "1"]
    assert main(["train", *flat, "--run-dir", str(folder / "flat")]) == 0
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    (folder / "prompt_single.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture
def here(runs, tmp_path, monkeypatch):
    """A folder of a test's own with all of them."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def renders(monkeypatch):
    """Counts the renders of fields."""
    count = itertools.count()
    plain = RadianceField.render
    monkeypatch.setattr(RadianceField, "render", lambda *args: (next(count), plain(*args))[1])
    return lambda: next(count)


def files_in(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and BESIDE not in file.parts}


def test_gpteval3d_gets_120_colours_and_normals_of_each_particle_by_the_prompts_place(here, renders, capsys):
    assert main(["evaluate", "solid", *GPTEVAL3D, "--method", "ours", "--out", "methods"]) == 0
    assert "methods has particles of 1 of the 3 prompts of prompts.json" in capsys.readouterr().out
    assert files_in(here / "methods") == {f"ours/2/0/{kind}_{view}.png" for kind in ("rgb", "normal") for view in range(120)}
    pictures = [iio.imread(here / "methods" / "ours" / "2" / "0" / f"{kind}_0.png") for kind in ("rgb", "normal")]
    assert [picture.shape for picture in pictures] == [(8, 8, 3), (8, 8, 3)]
    assert pictures[1][0, 0].max() == 0, "normals stand before black"
    before = renders()
    assert main(["evaluate", "solid", *GPTEVAL3D, "--method", "ours", "--out", "methods"]) == 0
    assert renders() - before - 1 <= 2, "the two by which memory is estimated"
    assert "methods/ours/2/0 is complete" in capsys.readouterr().out


def test_a_second_run_of_a_prompt_is_another_seed_and_a_sweep_stands_for_its_runs(here, capsys):
    (here / "sweep").mkdir()
    write_settings(here / "sweep", SweepSettings(name="ducks"))
    write_manifest(here / "sweep", [PlannedRun(prompt="a green duck", seed=seed) for seed in range(3)])
    sweep = read_sweep(here / "sweep")
    assert main(["evaluate", "sweep", *GPTEVAL3D]) == 2
    assert "sweep sweep has no run with a checkpoint yet" in capsys.readouterr().err
    for run in sweep.runs[:2]:
        shutil.copytree("solid", sweep.run_dir(run))
    assert main(["evaluate", "sweep", *GPTEVAL3D]) == 0
    assert "1 of the 3 runs of sweep have no checkpoint yet, and are left out" in capsys.readouterr().out
    assert sorted(os.listdir("gpteval3d/dist_vsd/2")) == ["0", "1"]


def test_t3bench_gets_a_mesh_810_views_and_12_for_captions_by_the_prompts_name(here, capsys):
    assert main(["evaluate", "solid", *T3BENCH]) == 0
    assert "surface" not in capsys.readouterr().out
    kinds = {kind: f"seed_0/{kind}/dist_vsd_single/a_green_duck" for kind in ("outputs_mesh_t3", "views", "captions")}
    expected = {f"{kinds['outputs_mesh_t3']}/save/it1-export/model{end}" for end in (".obj", ".mtl", "_texture.png")}
    expected |= {f"{kinds['views']}/{place:03d}_{fov}.png" for place in range(162) for fov in range(5)}
    expected |= {f"{kinds['captions']}/{place:03d}.png" for place in range(12)}
    assert files_in(here / "t3bench") == expected
    assert any(iio.imread(here / "t3bench" / kinds["views"] / f"{place:03d}_2.png").any() for place in range(3))
    assert main(["evaluate", "solid", *T3BENCH]) == 0
    assert "is complete" in capsys.readouterr().out


BAD = {
    "solid --protocol t3bnch --prompts prompts.json": ("--protocol must be one of t3bench, gpteval3d", "did you mean t3bench"),
    "solid --protocol gpteval3d": ("--protocol gpteval3d needs --prompts FILE", "prompts.json of github.com/3DTopia/GPTEval3D"),
    "solid --protocol t3bench": ("--protocol t3bench needs --prompts FILE", "github.com/THU-LYJ-Lab/T3Bench"),
    "solid G --metrics clip": ("--metrics is for metrics", "leave one of them out"),
    "solid G --num-azimuths 4": ("--num-azimuths is for metrics",),
    "solid G --method ../up": ("--method must be a name of letters", "'../up'"),
    "solid G --size 0": ("--size must be at least 1, got 0",),
    "solid G --out all.csv": ("--out is a folder where --protocol is given", "'all.csv'"),
    "solid G --out prompts.json/x": ("prompts.json is a file",),
    "solid G --size 10000000": ("--size 10000000 can't fit",),
    "solid --method ours": ("--method says how --protocol names or writes pictures",),
    "flat G": ("flat holds image particles, which show no normals", "needs radiance_field or mesh"),
    "flat T": ("flat holds image particles, which have no surface", "needs radiance_field or mesh"),
    "absent G": ("run directory absent does not exist",),
    "half G": ("half has no valid checkpoint",),
    "solid solid flat G": ("flat holds image particles",),
    "solid --protocol t3bench --prompts other.txt": ("solid has the prompt 'a green duck', which --prompts other.txt has not",),
    "solid --protocol t3bench --prompts absent.txt": ("absent.txt can't be read (FileNotFoundError)",),
    "solid --protocol gpteval3d --prompts broken.json": ("broken.json can't be read (JSONDecodeError)",),
    "solid --protocol gpteval3d --prompts object.json": ("object.json must be a JSON list of texts",),
    "solid --protocol t3bench --prompts twice.txt": ("twice.txt holds 'a red mug' twice",),
    "solid --protocol t3bench --prompts empty.txt": ("empty.txt holds no prompt",),
    "solid G --out taken": ("taken/dist_vsd/2/0 is there and was not written by this command",),
    "solid@coarse G": ("solid has no stage 'coarse'",),
}


@pytest.fixture(scope="module")
def bad_place(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(runs, folder, dirs_exist_ok=True)
    shutil.copytree(folder / "solid", folder / "half")
    shutil.rmtree(folder / "half" / "checkpoints")
    texts = {"other.txt": "a red mug\n", "broken.json": "[", "object.json": "{}", "twice.txt": "a red mug\n" * 2, "empty.txt": "\n"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "taken" / "dist_vsd" / "2" / "0").mkdir(parents=True)
    return folder


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(words, bad_place, monkeypatch, capsys):
    monkeypatch.chdir(bad_place)
    before = sorted(bad_place.rglob("*"))
    short = {"G": GPTEVAL3D[:4], "T": T3BENCH[:4]}
    assert main(["evaluate", *itertools.chain(*(short.get(word, [word]) for word in words.split()))]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("dist-vsd"))
    for part in BAD[words]:
        assert part in line
    assert sorted(bad_place.rglob("*")) == before
