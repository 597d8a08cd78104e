"""priors/embedded/recipe.py and stage.py, end to end in small: resumable to the bit, and its folder is a pipeline."""

import dataclasses

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from dist_vsd.priors.clip import ClipScorer
from dist_vsd.priors.embedded import pictures as pictures_module
from dist_vsd.priors.embedded.captions import vocabulary
from dist_vsd.priors.embedded.losses import fade
from dist_vsd.priors.embedded.pictures import Pictures, read_shards, render_shard, write_shard
from dist_vsd.priors.embedded.recipe import NUM_HELD_OUT_SHARDS, RecipeConfig, train_prior, write_prior
from dist_vsd.priors.embedded.stage import StageSettings, learning_rate_factor, train_stage
from dist_vsd.priors.pipeline_folder import find_pipeline
from dist_vsd.priors.sampling import sample_images
from dist_vsd.priors.stable_diffusion import StableDiffusionPrior

CPU = torch.device("cpu")
TINY = RecipeConfig(num_shards=NUM_HELD_OUT_SHARDS + 1, vae_steps=2, denoiser_steps=1, clip_steps=1, num_workers=1)
NETWORKS = ("vae", "unet", "text_encoder", "clip")


class Stopped(Exception):
    """What a test raises where a user would press Ctrl-C."""


def silent(stage, done, total, figures):
    pass


def stop_in_the_denoiser(stage, done, total, figures):
    if stage == "denoiser":
        raise Stopped


def weights(prior):
    return {f"{n}.{name}": p for n in NETWORKS for name, p in getattr(prior, n).state_dict().items()}


@pytest.fixture(scope="module")
def pictures_folder(tmp_path_factory):
    """Render shards of one picture an object; whole ones take minutes."""
    folder = tmp_path_factory.mktemp("work") / "pictures"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures_module, "SHARD_SIZE", 12)
        for shard in range(TINY.num_shards):
            write_shard(folder, TINY.seed, shard)
    return folder


def work_folder(pictures_folder, path):
    path.mkdir()
    (path / "pictures").symlink_to(pictures_folder)
    return path


@pytest.fixture(scope="module")
def finished(pictures_folder, tmp_path_factory):
    """Return the networks' weights of an uninterrupted recipe, and the folder that it wrote."""
    work = work_folder(pictures_folder, tmp_path_factory.mktemp("whole") / "work")
    prior, held_out = train_prior(TINY, work, CPU, silent)
    assert len(held_out) == 12 * NUM_HELD_OUT_SHARDS
    kept = {name: p.clone() for name, p in weights(prior).items()}
    folder = tmp_path_factory.mktemp("whole") / "prior"
    write_prior(prior, folder)
    return kept, folder


def test_a_recipe_stopped_between_stages_and_resumed_equals_an_uninterrupted_one_to_the_bit(finished, pictures_folder, tmp_path):
    work = work_folder(pictures_folder, tmp_path / "work")
    with pytest.raises(Stopped):
        train_prior(TINY, work, CPU, stop_in_the_denoiser)
    assert sorted(file.name for file in work.glob("*.safetensors")) == ["latents.safetensors", "vae.safetensors"]
    resumed = weights(train_prior(TINY, work, CPU, silent)[0])
    different = [name for name, whole in finished[0].items() if not torch.equal(resumed[name], whole)]
    assert different == []


def test_the_written_folder_is_a_diffusers_pipeline_in_fp16_of_at_most_12_mb(finished):
    kept, folder = finished
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16, use_safetensors=True)
    for name, weight in pipeline.unet.state_dict().items():
        assert torch.equal(weight, kept[f"unet.{name}"].half()), name
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) <= 12e6
    assert not list(folder.rglob("*.bin"))


def test_the_written_folder_is_found_sampled_and_scored_by_dist_vsd(finished):
    found = find_pipeline(str(finished[1]))
    assert set(found.variants) == {"unet", "vae", "text_encoder"}
    assert found.facts["vocabulary"] == vocabulary()
    assert found.facts["camera"]["distance"] == list(pictures_module.DISTANCE_RANGE)
    image = sample_images(StableDiffusionPrior.load(str(finished[1])), ["a green duck"], num_steps=2, guidance_scale=7.5, seeds=[0])
    assert image.shape == (1, 3, 64, 64)
    scorer = ClipScorer.load(finished[1] / "clip")
    # Unit vectors in fp32.
    torch.testing.assert_close(scorer.embed_images(image).norm(dim=-1), torch.ones(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(scorer.embed_texts(["a duck", "a mug"]).norm(dim=-1), torch.ones(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_a_stage_stopped_at_any_step_and_resumed_equals_an_uninterrupted_one_to_the_bit(tmp_path, stop_at):
    settings = StageSettings(name="line", num_steps=5, learning_rate=0.1, num_warmup_steps=2, save_every=2)

    def run(folder, stop_at=None):
        torch.manual_seed(0)
        network = nn.Linear(3, 2)

        def loss(step, generator):
            if step == stop_at:
                raise Stopped
            return (network(torch.randn(4, 3, generator=generator)) - 1).square().mean()

        return train_stage(settings, {"net": network}, loss, folder, 7, CPU, silent)

    with pytest.raises(Stopped):
        run(tmp_path / "stopped", stop_at)
    resumed, whole = run(tmp_path / "stopped"), run(tmp_path / "whole")
    assert whole.keys() == {"net.weight", "net.bias"}
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_finished_stage_is_read_back_without_another_step(tmp_path):
    settings, network = StageSettings(name="line", num_steps=2, learning_rate=0.1), nn.Linear(2, 1)

    def loss(step, generator):
        return network(torch.randn(4, 2, generator=generator)).square().mean()

    def never(step, generator):
        raise AssertionError("a finished stage takes no steps")

    average = train_stage(settings, {"net": network}, loss, tmp_path, 0, CPU, silent)
    kept = {name: value.clone() for name, value in average.items()}
    nn.init.zeros_(network.weight)
    train_stage(settings, {"net": network}, never, tmp_path, 0, CPU, silent)
    assert torch.equal(network.weight, kept["net.weight"])


def test_the_learning_rate_warms_up_and_falls_to_zero_by_hand():
    factors = [learning_rate_factor(step, 100, 10) for step in (0, 4, 9, 10, 55, 99, 100)]
    assert factors == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5, 1 / 90, 0.0], abs=1e-12)


def test_a_shard_depends_on_its_seed_and_index_alone(pictures_folder, monkeypatch):
    monkeypatch.setattr(pictures_module, "SHARD_SIZE", 12)
    torch.manual_seed(5)
    again, read = render_shard(0, 2), read_shards(pictures_folder, [2])
    assert torch.equal(again.images, read.images)
    assert again.subjects == read.subjects
    assert not torch.equal(read_shards(pictures_folder, [3]).images, read.images)
    assert len({subject.name for subject in read.subjects}) == 12


def test_mirrored_pictures_of_a_batch_are_flipped_left_to_right_alone():
    images = torch.randint(256, (3, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    batch = Pictures(images, []).batch(torch.tensor([2, 0]), torch.tensor([True, False]))
    assert torch.equal(batch[0], images[2].flip(-1) / 255.0)
    assert torch.equal(batch[1], images[0] / 255.0)


def test_a_quarter_of_the_pictures_fades_towards_white():
    images = torch.zeros(4000, 3, 1, 1)
    faded = fade(images, torch.Generator().manual_seed(0))[:, 0, 0, 0]
    # Four standard deviations of a quarter of 4,000; black fades to 0.7 at the most.
    assert float((faded > 0).float().mean()) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 4000) ** 0.5)
    assert 0.65 < float(faded.max()) <= 0.7
    assert torch.equal(fade(torch.ones(8, 3, 2, 2), torch.Generator().manual_seed(0)), torch.ones(8, 3, 2, 2))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"num_shards": 4}, "--num-shards must be above 4, the number held out, got 4"),
        ({"vae_steps": 0}, "--vae-steps must be at least 1, got 0"),
        ({"num_workers": 0}, "--num-workers must be at least 1, got 0"),
    ],
)
def test_recipes_that_can_not_be_are_refused(changes, rule):
    with pytest.raises(ValueError, match=rule):
        dataclasses.replace(TINY, **changes)
