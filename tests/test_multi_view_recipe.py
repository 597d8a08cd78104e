"""The prior of four views: what its recipe draws, where it starts from, its folder, end to end in small; and the weights that ship."""

import json

import pytest
import torch

from dist_vsd.cameras import look_at_origin
from dist_vsd.priors.clip import ClipScorer
from dist_vsd.priors.embedded import view_groups
from dist_vsd.priors.embedded.captions import NORMAL_MAP, vocabulary
from dist_vsd.priors.embedded.losses import tokenize
from dist_vsd.priors.embedded.multi_view_card import TURN, draw_groups, judge_groups, spread_of_heights
from dist_vsd.priors.embedded.multi_view_recipe import HIGH_T_FROM, draw_t, start_networks, train_multi_view, write_multi_view
from dist_vsd.priors.embedded.recipe_config import NUM_HELD_OUT_GROUP_SHARDS, MultiViewRecipeConfig
from dist_vsd.priors.embedded.render import render_channels
from dist_vsd.priors.embedded.scenes import NUM_PROPORTIONS, OBJECTS, WITH_A_FRONT
from dist_vsd.priors.embedded.view_groups import cameras_of, draw_captions, read_shards, write_shard
from dist_vsd.priors.pipeline_folder import EMBEDDED_FOLDER, EMBEDDED_FOLDERS, find_pipeline
from dist_vsd.priors.sampling import sample_images
from dist_vsd.priors.stable_diffusion import StableDiffusionPrior
from dist_vsd.priors.table import load_prior
from dist_vsd.serialization import read_tensors

CPU = torch.device("cpu")
SUBJECT = ("duck", "green")


def silent(stage, done, total, figures):
    pass


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_views_of_a_group_are_a_quarter_turn_apart_and_share_the_rest():
    cameras = cameras_of(torch.tensor([[-170.0, 20.0, 3.0, 40.0], [10.0, 60.0, 2.7, 45.0]]))
    assert [round(value) for value in cameras.azimuth_deg.tolist()] == [-170, -80, 10, 100, 10, 100, -170, -80]
    assert cameras.elevation_deg.tolist() == [20.0] * 4 + [60.0] * 4
    torch.testing.assert_close(cameras.c2w[:, :3, 3].norm(dim=1), torch.tensor([3.0] * 4 + [2.7] * 4))


def test_half_of_the_times_are_from_the_highest_and_both_parts_are_stratified():
    t = torch.stack([draw_t(16, 1000, generator(seed)) for seed in range(50)])
    assert t.min() >= 0
    assert t.max() <= 999
    low_half = (t < 1000 * HIGH_T_FROM).float().mean()
    assert abs(low_half - 0.5 * HIGH_T_FROM) < 0.03  # of the uniform half, that share lies below
    assert ((t >= 1000 * HIGH_T_FROM).sum(1) >= 10).all()  # 8 of the high half, and at least 2 of the uniform one


def test_captions_leave_words_out_for_a_whole_group_and_drop_the_camera_with_all_of_them_alone():
    cameras = cameras_of(torch.tensor([[0.0, 10.0, 3.0, 40.0]]))
    draws = [draw_captions(SUBJECT, cameras, None, generator(seed)) for seed in range(2000)]
    empty = [dropped for words, dropped in draws if words == [""] * 4]
    assert abs(len(empty) / 2000 - 0.10) < 0.02
    assert abs(sum(empty) / len(empty) - 0.60) < 0.10
    assert not any(dropped for words, dropped in draws if words != [""] * 4)
    told = [words for words, _ in draws if words[0]]
    with_views = [words for words in told if words[0].endswith("view")]
    assert abs(len(with_views) / len(told) - 0.5) < 0.04
    around = ("front view", "side view", "back view", "side view")
    assert {tuple(word.rsplit(", ")[-1] for word in words) for words in with_views} == {around}
    normals = [draw_captions(SUBJECT, cameras, NORMAL_MAP, generator(seed)) for seed in range(100)]
    assert all(word.endswith(f", {NORMAL_MAP}") for words, _ in normals for word in words)
    assert not any(dropped for _, dropped in normals)


def test_the_normal_map_of_a_ball_is_blue_in_the_middle_and_tells_right_and_up():
    """(n + 1) / 2 along the camera's axes; a pixel of 33 is 0.04 of the radius off the middle at the most, and the rim is blended."""
    camera = look_at_origin(*(torch.tensor([value]) for value in (70.0, 25.0, 3.0, 40.0)))
    _, normals = render_channels("ball", ["red"], torch.zeros(1, NUM_PROPORTIONS), camera, 33)
    image = normals[0]
    torch.testing.assert_close(image[:, 16, 16], torch.tensor([0.5, 0.5, 1.0]), rtol=0, atol=0.01)
    assert image[0, 16, 24] > 0.8 > 0.2 > image[0, 16, 8]  # x: right
    assert image[1, 8, 16] > 0.8 > 0.2 > image[1, 24, 16]  # y: up
    assert torch.equal(image[:, 0, 0], torch.ones(3))


def test_the_start_is_the_base_to_the_bit_where_views_are_apart(tmp_path):
    """The camera says nothing yet, and known words have the numbers that they had, whatever theirs in the vocabulary."""
    base = StableDiffusionPrior.load("embedded")
    networks = start_networks(EMBEDDED_FOLDER, tmp_path)
    texts = ["a green duck, side view", "", "a red car"]
    with torch.no_grad():
        tokens = networks.text_encoder(tokenize(networks.tokenizer, texts))[0]
        known = base.embed(texts).cond.tokens
        torch.testing.assert_close(tokens, known, rtol=1e-5, atol=1e-5)  # texts together or one by one
        x_t, t = torch.randn(3, 4, 16, 16, generator=generator()).repeat_interleave(4, 0), torch.tensor([20, 500, 900]).repeat_interleave(4)
        y = known.repeat_interleave(4, 0)
        # Four times the same view attend to themselves as one does.
        found = networks.unet(x_t, t, y, class_labels=torch.randn(12, 16)).sample
        torch.testing.assert_close(found, base.unet(x_t, t, y).sample, rtol=1e-4, atol=1e-5)
    assert len(networks.tokenizer.tokenize("a duck, normal map")) == 5


def test_the_recipe_resumes_to_the_bit_and_writes_a_folder_that_is_found_and_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(view_groups, "SHARD_UNIT", 2)
    config = MultiViewRecipeConfig(num_group_shards=NUM_HELD_OUT_GROUP_SHARDS + 1, steps=2, batch=2, num_workers=1)
    for shard in range(config.num_group_shards):
        write_shard(tmp_path / "work" / "groups", config.seed, shard, EMBEDDED_FOLDER / "vae")
    groups = read_shards(tmp_path / "work" / "groups", [0])
    assert len(groups) == 2 * (len(OBJECTS) + len(WITH_A_FRONT))
    assert [name for name, _ in groups.subjects].count("duck") == 4
    assert len(groups.color) == len(groups)
    assert len(groups.normal) == len(groups) // view_groups.NORMAL_EVERY
    networks, held_out = train_multi_view(config, EMBEDDED_FOLDER, tmp_path / "work", CPU, silent)
    assert len(held_out) == NUM_HELD_OUT_GROUP_SHARDS * len(groups)
    first = read_tensors(tmp_path / "work" / "multiview.safetensors")
    again, _ = train_multi_view(config, EMBEDDED_FOLDER, tmp_path / "work", CPU, silent)
    for name, weight in again.unet.state_dict().items():
        assert torch.equal(weight, networks.unet.state_dict()[name])
    assert first["average/unet.class_embedding.linear_2.weight"].abs().sum() > 0
    write_multi_view(networks, EMBEDDED_FOLDER, tmp_path / "prior")
    assert [file for file in (tmp_path / "prior").rglob("*.json") if "_name_or_path" in file.read_text()] == []
    folder = find_pipeline(str(tmp_path / "prior"))
    assert folder.facts["vocabulary"] == vocabulary(NORMAL_MAP)
    assert folder.facts["camera"] == find_pipeline("embedded").facts["camera"]
    drawn = sample_images(load_prior(str(tmp_path / "prior")), ["a duck, normal map"], 2, 7.5, [0])
    assert drawn.shape == (4, 3, 64, 64)


def test_heights_of_silhouettes_are_compared_within_a_group():
    groups = torch.ones(2, 4, 3, 64, 64)
    for view, height in enumerate((10, 12, 12, 15)):
        groups[0, view, :, 20 : 20 + height, 30:40] = 0.5
        groups[1, view, :, 20:40, 30:40] = 0.5
    assert spread_of_heights(groups) == 2.5


SHIPPED = EMBEDDED_FOLDERS["embedded-multiview"]
FLOORS = {"right_view": 0.85, "one_front": 0.7, "r_precision": 0.88}


def test_the_shipped_weights_draw_an_object_from_four_sides_with_one_front():
    """Of two groups each of a duck and a chair, at guidance 7.5, by the embedded CLIP: one view of sixteen may be off."""
    subjects = [("duck", "green"), ("chair", "red"), ("duck", "yellow"), ("chair", "blue")]
    drawn = draw_groups(load_prior("embedded-multiview"), subjects, 7.5)
    found = judge_groups(ClipScorer.load(), drawn, subjects)
    assert found["right_view"] >= 15 / 16
    assert found["one_front"] >= 3 / 4


def test_the_shipped_weights_hear_the_camera_and_the_other_views():
    prior = load_prior("embedded-multiview")
    y = prior.embed(["a duck"] * 4).cond
    x_t, t = torch.randn(1, *prior.latent_shape, generator=generator()).expand(4, -1, -1, -1), torch.full((4,), 900)
    with torch.no_grad():
        told, untold = prior.predict(x_t, t, y, TURN), prior.predict(x_t, t, y, TURN.dropped())
    assert (untold - untold[:1]).abs().max() < 1e-4  # the same noise, the same text, no camera: the same answer
    assert (told[0] - told[2]).square().mean() > 1e-5


def test_the_card_meets_its_floors_and_all_that_ships_is_small():
    figures = json.loads((SHIPPED / "measurements.json").read_text())["figures"]
    card = (SHIPPED / "README.md").read_text()
    for judged in figures["by_guidance"].values():
        assert {name: judged[name] for name in FLOORS if judged[name] < FLOORS[name]} == {}
        assert f"| {judged['right_view']:.3f} | {judged['one_front']:.3f} | {judged['r_precision']:.3f} |" in card
    files = [file for folder in EMBEDDED_FOLDERS.values() for file in folder.rglob("*.safetensors")]
    assert sum(file.stat().st_size for file in files) <= 24e6
    assert (SHIPPED / "samples.png").stat().st_size > 0
    assert find_pipeline("embedded-multiview").facts["vocabulary"] == vocabulary(NORMAL_MAP)


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_the_vae_is_the_embedded_priors_own(name):
    assert (SHIPPED / "vae" / name).read_bytes() == (EMBEDDED_FOLDER / "vae" / name).read_bytes()
