"""Priors that score four views together: attention over a group, the camera, phi beside them, and updates on any layout."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention

from dist_vsd.cameras import Cameras, look_at_origin, turntable
from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.evaluation.prior_samples import PriorSamples
from dist_vsd.priors.attention import AttentionBy, sdpa
from dist_vsd.priors.camera_pose import camera_pose
from dist_vsd.priors.multi_view import MultiViewPrior
from dist_vsd.priors.prior import Text, eps_pretrain
from dist_vsd.priors.replay import ASKED_BEFORE
from dist_vsd.priors.sampling import sample_images
from dist_vsd.priors.table import load_prior, prior_row
from dist_vsd.score.lora_score import LoraScore
from dist_vsd.score.score_config import ScoreConfig
from dist_vsd.training.state import build_state
from dist_vsd.training.update import update
from tests.ranks import run_ranks
from tests.runs import TINY, checkpoint
from tests.test_attention import softmax_attention
from tests.test_ranks import different, parameters, relative_difference

VIEWS = 4


@pytest.fixture(scope="module")
def prior(four_views):
    return load_prior(four_views)


def question(prior, num_groups=2, seed=0):
    """Return x_t, t, texts and cameras of some groups."""
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(num_groups * VIEWS, *prior.latent_shape, generator=generator)
    t = torch.randint(1000, (num_groups,), generator=generator).repeat_interleave(VIEWS)
    words = ["a duck, front view", "a duck, side view", "a duck, back view", "a red car"]
    cameras = Cameras.cat([turntable(VIEWS, 10.0 * (1 + i), 3.0, 40.0) for i in range(num_groups)])
    return x_t, t, prior.embed([words[i % 4] for i in range(len(x_t))]).cond, cameras


def in_order(asked, rows):
    return tuple(part[rows] for part in asked)


def test_views_attend_together_as_one_sequence_of_all_their_tokens():
    """The definition: softmax over the tokens of the four views, by the weights of one view. Rounding of fp32 sums of 20 terms."""
    torch.manual_seed(0)
    attn = Attention(query_dim=8, heads=2, dim_head=4, processor=AttentionBy(sdpa, VIEWS))
    hidden = torch.randn(2 * VIEWS, 5, 8)
    whole = hidden.reshape(2, VIEWS * 5, 8)
    q, k, v = (layer(whole).unflatten(2, (2, 4)) for layer in (attn.to_q, attn.to_k, attn.to_v))
    expected = attn.to_out[0](softmax_attention(q, k, v).flatten(2)).reshape(hidden.shape)
    torch.testing.assert_close(attn(hidden), expected, rtol=1e-5, atol=1e-6)
    text = torch.randn(2 * VIEWS, 3, 8)
    apart = AttentionBy(sdpa)
    torch.testing.assert_close(attn(hidden, text), apart(attn, hidden, text), rtol=0, atol=0)  # each view reads its own text


@torch.no_grad()
def test_a_view_depends_on_the_others_of_its_group_and_on_no_other_group(prior):
    x_t, t, y, cameras = question(prior)
    changed = x_t.clone()
    changed[1] += 1
    moved = (prior.predict(x_t, t, y, cameras) - prior.predict(changed, t, y, cameras)).abs().amax((1, 2, 3)) > 1e-5
    assert moved.tolist() == [True] * VIEWS + [False] * VIEWS


@torch.no_grad()
def test_neither_the_order_of_groups_nor_that_of_views_matters(prior):
    """Sums over a group's tokens are taken in another order where its views are: rounding of fp32."""
    asked = question(prior)
    whole = prior.predict(*asked)
    groups = [4, 5, 6, 7, 0, 1, 2, 3]
    torch.testing.assert_close(prior.predict(*in_order(asked, groups)), whole[groups], rtol=1e-5, atol=1e-6)
    views = [2, 0, 3, 1, 4, 5, 6, 7]
    torch.testing.assert_close(prior.predict(*in_order(asked, views)), whole[views], rtol=1e-4, atol=1e-5)
    alone = prior.predict(*in_order(asked, slice(VIEWS)))
    torch.testing.assert_close(alone, whole[:VIEWS], rtol=1e-5, atol=1e-6)


def test_a_pose_is_the_camera_to_world_matrix_with_a_translation_of_unit_length():
    """In front at distance 3: the camera's x axis is the world's y, its y axis z, its z axis (backward) x."""
    front = camera_pose(look_at_origin(*(torch.tensor([value]) for value in (0.0, 0.0, 3.0, 40.0))))
    expected = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    torch.testing.assert_close(front, expected.reshape(1, 16), rtol=0, atol=1e-6)
    above = camera_pose(look_at_origin(*(torch.tensor([value]) for value in (90.0, 30.0, 2.6, 40.0)))).reshape(4, 4)
    direction = torch.tensor([0.0, math.cos(math.radians(30)), 0.5])
    torch.testing.assert_close(above[:3, 3], direction, rtol=0, atol=1e-6)
    torch.testing.assert_close(above[:3, 2], direction, rtol=0, atol=1e-6)  # it looks along -z, at the origin
    assert camera_pose(Cameras.none(2)).abs().sum() == 0


@torch.no_grad()
def test_a_dropped_camera_is_none_and_guidance_drops_it_with_the_text(prior):
    x_t, t, _, cameras = question(prior)
    y = prior.embed(["a duck, side view"] * len(x_t))
    uncond = prior.predict(x_t, t, y.uncond, None)
    assert torch.equal(uncond, prior.predict(x_t, t, y.uncond, cameras.dropped()))
    cond = prior.predict(x_t, t, y.cond, cameras)
    assert float((cond - prior.predict(x_t, t, y.cond, None)).abs().max()) > 1e-4
    expected = uncond + 7.5 * (cond - uncond)
    torch.testing.assert_close(eps_pretrain(prior, x_t, t, y, 7.5, cameras), expected, rtol=1e-4, atol=1e-4)


def test_replayed_passes_of_prior_and_phi_are_the_same_to_the_bit_with_cameras(four_views):
    prior = load_prior(four_views)
    x_t, t, y, cameras = question(prior)
    score = LoraScore(prior.network, ScoreConfig(), torch.Generator().manual_seed(0))
    pose = cameras.c2w.flatten(1)
    with torch.no_grad():
        pretrained = prior.predict(x_t, t, y, cameras)
        assert torch.equal(score(x_t, t, y, pose, cameras), pretrained)  # phi starts as the prior
        for parameter in score.phi().values():
            parameter.add_(0.05)
        first = score(x_t, t, y, pose, cameras)
        for _ in range(ASKED_BEFORE + 2):
            again, of_prior = score(x_t, t, y, pose, cameras), prior.predict(x_t, t, y, cameras)
        assert score._repeated._recorded
        assert prior._predicted._recorded
        other = Cameras.cat([turntable(VIEWS, 60.0, 3.0, 40.0)] * 2)  # nothing of a camera was recorded
        assert not torch.equal(score(x_t, t, y, pose, other), again)
    assert torch.equal(again, first)
    assert torch.equal(of_prior, pretrained)
    assert not torch.equal(first, pretrained)


def test_phi_adapts_every_attention_and_another_network_takes_cameras_too(four_views):
    prior = load_prior(four_views)
    score = LoraScore(prior.network, ScoreConfig(), torch.Generator())
    attentions = [name for name, module in prior.unet.named_modules() if isinstance(module, Attention)]
    assert sum("lora_A" in name for name in score.phi()) == 4 * len(attentions)
    asked = question(prior)
    own = prior.network_of(four_views)
    tokens = Text(asked[2].tokens)
    with torch.no_grad():
        assert torch.equal(own(asked[0], asked[1], tokens, asked[3]), prior.network(asked[0], asked[1], tokens, asked[3]))


def test_a_sample_is_four_views_that_depend_on_its_seed_alone(prior):
    both = sample_images(prior, ["a duck", "a red car"], 2, 3.0, [3, 4])
    assert both.shape == (2 * VIEWS, 3, 16, 16)
    torch.testing.assert_close(sample_images(prior, ["a red car"], 2, 3.0, [4]), both[VIEWS:], rtol=0, atol=1e-5)


def test_samples_that_runs_are_compared_with_are_views_around_the_object(four_views):
    bank = PriorSamples(6, num_steps=2)
    drawn = bank.of(four_views, "a duck", ["front view", "back view"])
    assert drawn.pictures.shape == (6, 3, 16, 16)  # one shot and half of another
    assert torch.equal(drawn.pictures, bank.of(four_views, "a duck", []).pictures)


SETTINGS = {
    "prompt": "a green duck", "num_particles": 2, "num_updates": 4, "render_size": 16, "micro_batch_size": 4,
    "field": {"num_samples": 8, "dense_grid": {"resolutions": [6]}},
}  # fmt: skip


@pytest.mark.parametrize("objective", ["vsd", "sds"])
def test_micro_batches_do_not_change_an_update_of_four_views(four_views, objective):
    """In fp32 a mean over other batches rounds otherwise; Adam's first steps keep the sign of every gradient."""
    found = []
    for size in (4, 16):
        config = merge(load_preset("embedded"), SETTINGS | {"prior": four_views, "objective": objective, "micro_batch_size": size}, "test")
        state = build_state(config, Layout.of(2, num_views=8, views_per_shot=VIEWS), torch.device("cpu"))
        for index in range(2):
            update(state, index)
        found.append(dict(state.particles[0].theta.named_parameters()))
    for name, parameter in found[0].items():
        torch.testing.assert_close(parameter, found[1][name], rtol=1e-3, atol=1e-4)


WORDS = ["a green duck", *TINY, "--num-particles", "3", "--num-updates", "4", "--checkpoint-every", "2", "--render-size", "16"]


def run(four_views, folder, words=(), **options):
    code, output = run_ranks([*WORDS, "--prior", four_views, *words, "--run-dir", str(folder)], **options)
    assert code == 0, output
    return checkpoint(folder, 4)


@pytest.fixture(scope="module")
def one_rank(four_views, tmp_path_factory):
    return run(four_views, tmp_path_factory.mktemp("one") / "run", ["--deterministic"])


def test_two_ranks_give_the_same_bits(four_views, one_rank, tmp_path):
    assert different(one_rank, run(four_views, tmp_path / "run", ["--deterministic"], num_ranks=2)) == []


def test_a_run_stopped_half_way_and_resumed_is_the_same_to_the_bit(four_views, one_rank, tmp_path):
    run_dir = tmp_path / "run"
    run(four_views, run_dir, ["--deterministic"])
    shutil.rmtree(run_dir / "checkpoints" / "update_00000004")
    (run_dir / "outcome.json").unlink()
    code, output = run_ranks(["--resume", "--run-dir", str(run_dir)])
    assert code == 0, output
    assert different(one_rank, checkpoint(run_dir, 4)) == []


def test_zero_gives_the_same_particles(four_views, one_rank, tmp_path):
    """3 particles on 2 ranks, so that one rank joins in a pass of the other's."""
    found = run(four_views, tmp_path / "run", num_ranks=2, config="deepspeed_zero2")
    assert relative_difference(parameters(one_rank), parameters(found)) < 1e-3


def test_a_multi_view_prior_is_known_by_its_facts(four_views, tmp_path):
    assert prior_row(four_views).views_per_shot == VIEWS
    assert isinstance(load_prior(four_views), MultiViewPrior)
    assert prior_row("embedded-multiview").views_per_shot == VIEWS
    assert prior_row("embedded").views_per_shot == prior_row(str(tmp_path)).views_per_shot == 1


def facts(folder, **changes):
    file = folder / "dist_vsd.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_cameras(folder):
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"class_embed_type": None}))


DAMAGES = {
    "another number of views": (lambda folder: facts(folder, views_per_shot=3), ("scores 3 views together", "4 can be used, or 1")),
    "no number of views": (lambda folder: facts(folder, views_per_shot=1), ("its unet takes cameras", "views_per_shot 1")),
    "no facts": (lambda folder: (folder / "dist_vsd.json").unlink(), ("its unet takes cameras", "views_per_shot 1")),
    "no cameras": (without_cameras, ("its unet takes no cameras", "views_per_shot 4")),
}


@pytest.mark.parametrize(("damage", "fragments"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(four_views, tmp_path, damage, fragments):
    folder = shutil.copytree(four_views, tmp_path / "prior")
    damage(Path(folder))
    refused(tmp_path, ["--prior", str(folder)], fragments)


def test_what_a_prior_of_four_views_can_not_serve_is_refused_in_one_line(four_views, tmp_path):
    for words, fragments in (
        (["--representation", "image"], ("scores 4 views of an object together, representation image has one",)),
        (["--num-views", "2"], ("this prior scores 4 views together, got num_views 2: use --num-views 4",)),
    ):
        refused(tmp_path, ["--prior", four_views, *words], fragments)


def refused(tmp_path, words, fragments):
    code, output = run_ranks([*WORDS, *words, "--run-dir", str(tmp_path / "run")])
    assert code == 2, output
    for fragment in fragments:
        assert fragment in output
    assert not (tmp_path / "run").exists()
