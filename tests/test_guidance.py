"""diffusion/guidance.py and the mixing of views, by hand-computed numbers."""

import dataclasses
import math

import pytest
import torch

from dist_vsd.cameras import Cameras, look_at_origin
from dist_vsd.config import CameraConfig, RunConfig
from dist_vsd.diffusion.guidance import classifier_free_guidance, perp_neg, perpendicular
from dist_vsd.diffusion.guidance_scale import GuidanceScale
from dist_vsd.diffusion.process import VariancePreserving
from dist_vsd.priors.prior import Text, TextEmbeddings, eps_pretrain
from dist_vsd.training.prompt import Prompt, views_of
from dist_vsd.view_words import VIEW_WORDS


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 1.0), (1.0, 3.0), (7.5, 16.0), (100.0, 201.0)])
def test_guidance_extrapolates_from_the_unconditional_prediction(scale, expected):
    eps_uncond, eps_cond = torch.full((2, 4), 1.0), torch.full((2, 4), 3.0)
    assert torch.equal(classifier_free_guidance(eps_uncond, eps_cond, scale), torch.full((2, 4), expected))


def test_the_perpendicular_part_has_no_share_of_the_other_vector_and_a_zero_vector_takes_nothing():
    x, y = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    assert float((perpendicular(x[None], y[None]) * y).sum().abs()) < 1e-12
    assert torch.equal(perpendicular(x[None], torch.zeros_like(x[None])), x[None])


def test_perp_neg_is_plain_guidance_where_negatives_lie_along_the_prompt_and_adds_only_what_is_perpendicular():
    uncond, cond = torch.zeros(1, 3), torch.tensor([[2.0, 0.0, 0.0]])
    along, across = torch.tensor([[-5.0, 0.0, 0.0]]), torch.tensor([[7.0, 3.0, 0.0]])
    weights = torch.tensor([[-1.5], [-0.5]])
    assert torch.equal(perp_neg(uncond, cond, [along, along], weights, 7.5), classifier_free_guidance(uncond, cond, 7.5))
    # By hand: 10 ((2, 0, 0) - 0.5 (0, 3, 0)).
    assert torch.equal(perp_neg(uncond, cond, [along, across], weights, 10.0), torch.tensor([[20.0, -15.0, 0.0]]))


class Echo:
    """A prior whose prediction is the first number of its text."""

    process = VariancePreserving(torch.tensor([0.9, 0.5, 0.1]).double())

    def predict(self, x_t, t, y, cameras=None):
        return y.tokens[:, 0, :1] * torch.ones_like(x_t)


def rows(*values):
    return Text(torch.tensor(values)[:, None, None].expand(-1, 1, 2).clone(), torch.tensor(values)[:, None].clone())


def test_eps_pretrain_asks_for_all_texts_in_one_batch_and_keeps_them_apart():
    y = TextEmbeddings(rows(3.0, 4.0), rows(1.0, 1.0), (rows(1.0, 1.0),), torch.zeros(1, 2))
    x_t, t = torch.zeros(2, 5), torch.tensor([1, 2])
    assert eps_pretrain(Echo(), x_t, t, dataclasses.replace(y, negatives=(), negative_weights=None), 1.0)[:, 0].tolist() == [3.0, 4.0]
    assert eps_pretrain(Echo(), x_t, t, y, 2.0)[:, 0].tolist() == [5.0, 7.0]


def test_guidance_is_another_where_t_is_small():
    """Of three steps, t = 1 and t = 2 are 1/3 and 2/3 of the range: eps = uncond + s (cond - uncond) with s = 2 up to a half, else 7."""
    y, x_t, t = TextEmbeddings(rows(3.0, 4.0), rows(1.0, 1.0)), torch.zeros(2, 5), torch.tensor([1, 2])
    scale = GuidanceScale(coarse=7.0, fine=2.0, boundary=0.5).at(Echo.process, t, x_t)
    assert scale.flatten().tolist() == [2.0, 7.0]
    assert eps_pretrain(Echo(), x_t, t, y, scale)[:, 0].tolist() == [5.0, 22.0]
    assert GuidanceScale(7.0, 7.0, 0.5).at(Echo.process, t, x_t) == 7.0


def test_a_run_has_one_guidance_unless_it_names_another_for_small_t():
    assert RunConfig(guidance_scale=7.5).guidance == GuidanceScale(7.5, 7.5, 0.5)
    assert RunConfig(guidance_scale=7.5, fine_guidance_scale=3.0).guidance == GuidanceScale(7.5, 3.0, 0.5)
    with pytest.raises(ValueError, match="fine_guidance_scale must be 0 or more, got -1.0: raise --fine-guidance-scale"):
        RunConfig(fine_guidance_scale=-1.0)


def test_guidance_without_an_unconditional_text_is_refused_in_one_line():
    with pytest.raises(ValueError, match="guidance_scale 7.5 needs the embedding of a negative"):
        eps_pretrain(Echo(), torch.zeros(1, 5), torch.tensor([1]), TextEmbeddings(rows(3.0), None), 7.5)


def cameras(*azimuth_deg, elevation_deg=15.0):
    ones = torch.ones(len(azimuth_deg))
    return look_at_origin(torch.tensor(azimuth_deg), elevation_deg * ones, 3 * ones, 40 * ones)


FRONT, SIDE, BACK, OVERHEAD = 1.0, 10.0, 100.0, 1000.0
BY_VIEW = TextEmbeddings(rows(FRONT, SIDE, BACK, OVERHEAD), rows(*[0.0] * 4))


def mixed(where: Cameras):
    return Prompt(BY_VIEW, rows(5.0), perp_neg=True).for_views(views_of(where, CameraConfig()), where.azimuth_deg)


def test_perp_neg_mixes_the_texts_of_the_views_beside_an_azimuth():
    y = mixed(cameras(0.0, 45.0, -45.0, 90.0, 135.0, 180.0))
    expected = [FRONT, (FRONT + SIDE) / 2, (FRONT + SIDE) / 2, SIDE, (SIDE + BACK) / 2, BACK]
    torch.testing.assert_close(y.cond.tokens[:, 0, 0], torch.tensor(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.cond.pooled[:, 0], torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_perp_neg_steers_away_from_the_side_in_front_and_from_the_front_elsewhere():
    front, side = mixed(cameras(0.0, 90.0, 180.0)).negative_weights
    # -(4 exp(-r / 2) - 2.426) at r = 0 and 1, and -(exp(-r / 2) + 0.967) and -(exp(-r / 2) - 0.606) at r = 0.
    torch.testing.assert_close(front, torch.tensor([-(4 / math.sqrt(math.e) - 2.426), -(1 / math.sqrt(math.e) + 0.967), -1.967]))
    torch.testing.assert_close(side, torch.tensor([-1.574, -(1 / math.sqrt(math.e) - 0.606), -0.394]), rtol=1e-3, atol=1e-6)


def test_from_above_nothing_is_steered_away_from():
    y = mixed(cameras(0.0, 120.0, elevation_deg=75.0))
    assert y.cond.tokens[:, 0, 0].tolist() == [OVERHEAD, OVERHEAD]
    assert not y.negative_weights.any()


def test_without_perp_neg_each_camera_has_its_view_words_and_a_prompt_without_views_is_the_same_for_all():
    where = cameras(0.0, 100.0, 180.0)
    views = views_of(where, CameraConfig())
    assert Prompt(BY_VIEW, rows(5.0)).for_views(views, where.azimuth_deg).cond.tokens[:, 0, 0].tolist() == [FRONT, SIDE, BACK]
    plain = TextEmbeddings(rows(5.0), rows(0.0))
    assert Prompt(None, plain).for_views(views, where.azimuth_deg).cond.tokens[:, 0, 0].tolist() == [5.0] * 3
    assert len(VIEW_WORDS) == 4
