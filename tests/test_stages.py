"""A run of several stages: each begins from what the one before has left, and all that holds of a run holds of it."""

import dataclasses
import json
import shutil

import pytest
import torch
import yaml

from dist_vsd.config import RunConfig
from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.particles.particle import Render
from dist_vsd.particles.representations import REPRESENTATIONS
from dist_vsd.particles.siren import SirenParticle
from dist_vsd.priors.clip import EMBEDDED_CLIP_FOLDER
from dist_vsd.runs.saved_run import open_run
from dist_vsd.training.stages import ONLY_STAGE, stage_after, stage_of_checkpoint, stages_of
from dist_vsd.training.state import build_state
from dist_vsd.training.update import update
from tests.ranks import run_ranks
from tests.runs import TINY, checkpoint, gradients_taken
from tests.test_ranks import different

# By VSD, by SDS, and by VSD again with a phi of its own and less noise. Latent particles render at once.
STAGES = {
    "coarse": {"num_updates": 3},
    "colors": {"num_updates": 2, "objective": "sds", "guidance_scale": 30.0},
    "fine": {"num_updates": 2, "timesteps": {"late_max_fraction": 0.3, "max_fraction": 0.3}},
}
FIELD = {"coarse": {"num_updates": 2}, "colors": {"num_updates": 1, "objective": "sds", "trains": ["mlp"], "render_size": 24}}
LAST = 7
SMALL = {}
WORDS = ["a green duck", *TINY[2:], "--preset", "latent", "--num-particles", "2", "--deterministic", "--keep-checkpoints", "1"]


@pytest.fixture(scope="module", autouse=True)
def small_prior(random_prior):
    """Have latent particles scored by a prior of a few thousand weights: stages don't ask what a prior has learned."""
    SMALL.update(prior=random_prior, latent={"resolution": 8})


def run(folder, words, code=0, **options):
    small = ["--prior", SMALL["prior"], "--latent.resolution", "8"] if "latent" in words and "image" not in words else []
    found, output = run_ranks([*words, *small, "--run-dir", str(folder)], **options)
    assert found == code, output
    return output


def with_stages(tmp_path, stages=STAGES):
    file = tmp_path / "stages.yaml"
    file.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return [*WORDS, "--config", str(file)]


def manifest(folder, update):
    return json.loads((folder / "checkpoints" / f"update_{update:08d}" / "manifest.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three stages on one rank."""
    folder = tmp_path_factory.mktemp("stages")
    output = run(folder / "run", [*with_stages(folder), "--clip", str(EMBEDDED_CLIP_FOLDER)])  # or that there is none is an event
    return folder / "run", output


def test_stages_follow_one_another_and_checkpoints_name_theirs(whole):
    folder, _ = whole
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["update_00000003", "update_00000005", "update_00000007"]
    assert (manifest(folder, 5)["stage"], manifest(folder, LAST)["stage"]) == ("colors", "fine")
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if "event" in line]
    assert [(e["update"], e["event"]) for e in events] == [
        (3, "stage colors begins from the particles after update 3"),
        (5, "stage fine begins from the particles after update 5"),
    ]


def test_a_stage_trains_the_groups_that_it_names_alone(tmp_path):
    words = ["embedded" if word == "latent" else word for word in with_stages(tmp_path, FIELD)]
    run(tmp_path / "run", [*words, *TINY[-8:], "--num-particles", "1", "--render-size", "16"])
    before, after = (checkpoint(tmp_path / "run", number) for number in (2, 3))
    moved = {name.split(":theta/")[1].split(".")[0] for name in after if ":theta/" in name and not torch.equal(before[name], after[name])}
    assert {"hidden", "output"} <= moved
    assert "encoding" not in moved
    assert not any(name.startswith("phi") for name in after)  # SDS has none
    saved = open_run(tmp_path / "run").config
    assert (saved.render_size, saved.objective) == (24, "sds")  # what is shown of a run is of the stage that it came to


def test_the_layout_changes_no_bit_in_any_stage(tmp_path):
    """Two ranks have a particle each; two that share one take a view of it each."""
    words = [*with_stages(tmp_path), "--num-views", "2"]
    run(tmp_path / "one", words)
    for shards in ("1", "2"):
        run(tmp_path / shards, [*words, "--num-shards", shards], num_ranks=2)
        assert different(checkpoint(tmp_path / "one", LAST), checkpoint(tmp_path / shards, LAST)) == []


@pytest.fixture(scope="module")
def every_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("every")
    run(folder / "run", [*with_stages(folder), "--checkpoint-every", "1", "--keep-checkpoints", "99"])
    return folder / "run"


@pytest.mark.parametrize("update_", [3, 4, 6], ids=["end of a stage", "within the second", "within the third"])
def test_a_run_resumes_to_the_bit_within_a_stage_and_between_two(whole, every_checkpoint, tmp_path, update_):
    shutil.copytree(every_checkpoint, tmp_path / "run")
    for number in range(update_ + 1, LAST + 1):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"update_{number:08d}")
    output = run(tmp_path / "run", ["--resume"])
    assert f"resumed from update_{update_:08d}" in output
    assert different(checkpoint(whole[0], LAST), checkpoint(tmp_path / "run", LAST)) == []


@pytest.mark.parametrize("config", ["cpu", "deepspeed_zero2"])
def test_phi_is_made_anew_for_a_stage_under_ddp_and_zero(tmp_path, config):
    words = with_stages(tmp_path, {"coarse": {"num_updates": 2}, "fine": {"num_updates": 2}})
    words.remove("--deterministic")
    run(tmp_path / "run", words, num_ranks=2, config=config)
    assert manifest(tmp_path / "run", 4)["stage"] == "fine"
    assert manifest(tmp_path / "run", 4)["sha256"].keys() >= {"phi.safetensors"}


def test_a_particle_that_breaks_as_a_stage_begins_is_put_back_to_what_it_began_from(tmp_path):
    """The fault strikes the sixth update; the newest checkpoint is then of the stage before."""
    stages = {"coarse": {"num_updates": 4}, "fine": {"num_updates": 4}}
    words = [*with_stages(tmp_path, stages), "--checkpoint-every", "100"]
    output = run(tmp_path / "run", words, fault=("theta_becomes_nan", "0"))
    assert "particle 0: it is not finite; it is restored from its start" in output
    assert "particle 1: it is not finite; it is restored from its start" in output
    restored, began = checkpoint(tmp_path / "run", 8), checkpoint(tmp_path / "run", 4)
    name = "particles/0000.safetensors:theta/x_0"
    fresh = build_state(merge(load_preset("latent"), {"prompt": "a duck", **SMALL}, "test"), Layout.of(1), torch.device("cpu"))
    assert (restored[name] - began[name]).norm() < (fresh.particles[0].theta.x_0 - began[name]).norm()


def test_a_run_without_stages_is_one_stage():
    config = merge(load_preset("image"), {"prompt": "a red car"}, "test")
    (stage,) = stages_of(config)
    assert (stage.name, stage.config, stage.first, stage.last) == (ONLY_STAGE, config, 0, config.num_updates)


def test_updates_are_counted_through_and_schedules_by_the_stage():
    stages = stages_of(merge(RunConfig(), {"stages": STAGES}, "test"))
    assert [(stage.name, stage.first, stage.last) for stage in stages] == [("coarse", 0, 3), ("colors", 3, 5), ("fine", 5, 7)]
    assert [stages[1].progress(index) for index in (3, 4)] == [0.0, 0.5]
    assert [stage_after(stages, done).name for done in (0, 2, 3, 6, 7)] == ["coarse", "coarse", "colors", "fine", "fine"]
    assert [stage_of_checkpoint(stages, done).name for done in (1, 3, 4, 5, 7)] == ["coarse", "coarse", "colors", "colors", "fine"]


def test_a_picture_begins_from_a_coordinate_network_of_the_stage_before(tmp_path):
    stages = {"waves": {"num_updates": 2, "representation": "siren"}, "pixels": {"num_updates": 1, "representation": "image"}}
    run(tmp_path / "run", [*with_stages(tmp_path, stages), "--preset", "image", "--num-particles", "1", "--image.lr", "1e-6"])
    saved = open_run(tmp_path / "run")
    waves = SirenParticle(saved.config.siren, torch.Generator())
    left = {name.split(":theta/")[1]: t for name, t in checkpoint(tmp_path / "run", 2).items() if ":theta/" in name}
    waves.load_state_dict(left)
    size = saved.config.image.resolution
    torch.testing.assert_close(saved.particles[0].picture(size), waves.picture(size), rtol=0, atol=2e-3)


class Normals(SirenParticle):
    """A picture that has normals: its mirror image."""

    def render(self, cameras, size, drawn=None):
        plain = super().render(cameras, size, drawn)
        return Render(plain.image, plain.opacity, plain.foreground, {}, normal=1 - plain.image)


def test_an_objective_sees_the_channel_that_is_supervised(monkeypatch):
    """The encoded render of a mirrored picture: the gradient of SDS on normals moves theta otherwise than on colours."""
    row = dataclasses.replace(REPRESENTATIONS["siren"], made_by="tests.test_stages:Normals", shows=("color", "normal"))
    monkeypatch.setitem(REPRESENTATIONS, "siren", row)
    moved = {}
    for channel in ("color", "normal"):
        settings = {"prompt": "a red car", "num_particles": 1, "objective": "sds", "supervise": channel}
        state = build_state(merge(load_preset("siren"), settings, "test"), Layout.of(1), torch.device("cpu"))
        taken = gradients_taken(state.particles[0])
        update(state, 0)
        moved[channel] = list(taken.values())[-1]
    assert not torch.allclose(moved["color"], moved["normal"])


def test_words_can_be_put_after_every_prompt():
    config = merge(RunConfig(), {"prompt": "a duck", "prompting": {"suffix": "normal map"}}, "test")
    assert config.texts[:2] == ["a duck, normal map", "a duck, front view, normal map"]


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ({"coarse": {"num_updates": 4, "prompt": "a car"}}, "stage coarse can't change 'prompt'"),
        ({"coarse": {"num_updates": 4, "objectiv": "sds"}}, "stage coarse can't change 'objectiv' (did you mean objective"),
        ({"coarse": {}}, "stage coarse must say its num_updates"),
        ({"co/arse": {"num_updates": 4}}, "the name of a stage must be letters, digits, - and _, got 'co/arse'"),
        ({"coarse": 4}, "stages must map names to what each changes"),
        ({"a": {"num_updates": 2}, "b": {"num_updates": 2, "representation": "image"}}, "ImageParticle can't begin from LatentParticle"),
        ({"a": {"num_updates": 2, "supervise": "normal"}}, "supervise must be color for representation latent, got 'normal'"),
        ({"a": {"num_updates": 2, "trains": ["latnt"]}}, "got 'latnt' (did you mean latent?)"),
        ({"a": {"num_updates": 2, "representation": "radiance_field", "trains": ["background"]}}, "nothing of the particle would"),
    ],
)
def test_wrong_stages_are_refused_before_anything_is_written(tmp_path, stages, says):
    output = run(tmp_path / "run", with_stages(tmp_path, stages), code=2)
    assert says in output
    assert len(output.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_run_with_stages_has_their_number_of_updates(tmp_path):
    output = run(tmp_path / "run", [*with_stages(tmp_path), "--num-updates", "50"], code=2)
    assert "num_updates of a run with stages is their sum, 7, got 50" in output


def test_a_dry_run_tells_of_each_stage_and_writes_nothing(tmp_path):
    output = run(tmp_path / "run", [*with_stages(tmp_path), "--dry-run"])
    told = [line for line in output.splitlines() if line.startswith(("stage ", "time: ", "in all: "))]
    assert [line.split()[0] for line in told] == [*["stage", "time:"] * 3, "in"]
    assert told[::2][:3] == ["stage coarse, 3 updates:", "stage colors, 2 updates:", "stage fine, 2 updates:"]
    assert not (tmp_path / "run").exists()
