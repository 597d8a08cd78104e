"""Going on with a finished run, beginning from another run's particles, and runs of older versions."""

import json
import shutil

import pytest
import torch
import yaml

from dist_vsd.cli import main
from dist_vsd.runs.saved_run import open_run
from tests.runs import checkpoint

LATENT = ["a duck", "--preset", "latent", "--num-particles", "2", "--no-turntables", "--wandb.mode", "disabled"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two updates."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["train", *LATENT, "--num-updates", "2", "--run-dir", str(folder)]) == 0
    return folder


def events(folder):
    return [line["event"] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "event" in line]


def test_a_run_begins_from_another_runs_particles(tmp_path, finished):
    words = ["train", *LATENT, "--objective", "sds", "--num-updates", "1", "--latent.lr", "1e-9", "--run-dir", str(tmp_path / "next")]
    assert main([*words, "--start-from", str(finished)]) == 0
    assert any("particles begin as" in event and "after update 2" in event for event in events(tmp_path / "next"))
    before, after = (checkpoint(folder, update) for folder, update in ((finished, 2), (tmp_path / "next", 1)))
    name = "particles/0001.safetensors:theta/x_0"
    torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)  # a step of 1e-9


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--start-from", "nowhere"], "--start-from: run directory nowhere does not exist"),
        (["--num-particles", "3"], "has 2 particle(s), the run wants 3: lower --num-particles"),
        (["--representation", "image"], "ImageParticle can't begin from LatentParticle"),
    ],
)
def test_particles_that_can_not_be_begun_from_are_refused_before_anything_is_written(tmp_path, finished, capsys, words, rule):
    start = [] if "--start-from" in words else ["--start-from", str(finished)]
    assert main(["train", *LATENT, *start, *words, "--run-dir", str(tmp_path / "next")]) == 2
    assert rule in capsys.readouterr().err
    assert not (tmp_path / "next").exists()


def test_a_finished_run_goes_on_for_more_updates_and_says_what_that_means(finished, capsys):
    assert main(["train", "--resume", "--run-dir", str(finished), "--num-updates", "3"]) == 0
    assert "num_updates goes from 2 to 3: what is a fraction of the whole" in capsys.readouterr().out
    assert open_run(finished).update == 3
    assert main(["train", "--resume", "--run-dir", str(finished), "--num-updates", "1"]) == 2
    assert "--num-updates must be at least 3, which are done" in capsys.readouterr().err


def test_a_run_of_version_0_4_can_be_looked_at_and_is_told_who_goes_on_with_it(tmp_path, finished, capsys):
    """Its configuration has keys that are gone and lacks newer ones, and its fingerprint is of its own defaults."""
    old = tmp_path / "old"
    shutil.copytree(finished, old)
    config = yaml.safe_load((old / "config.yaml").read_text())
    config = {key: value for key, value in config.items() if key not in ("stages", "supervise", "trains", "start_from", "evaluate_clip")}
    (old / "config.yaml").write_text(yaml.safe_dump(config | {"media_every": 200, "evaluate_every": 200}))
    for file in old.glob("checkpoints/*/manifest.json"):
        manifest = json.loads(file.read_text()) | {"version": 2, "config_sha256": "0" * 64}
        file.write_text(json.dumps({key: value for key, value in manifest.items() if key != "stage"}))
    assert main(["render", str(old), "--kind", "grid"]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--run-dir", str(old)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "it has format version 2, which dist_vsd 0.2 to 0.4 reads" in line
