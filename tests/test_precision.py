"""Differences of scores are taken in fp32, whatever the networks' precision: by numbers that half precision can't tell apart."""

import types

import pytest
import torch

from dist_vsd.diffusion.guidance_scale import GuidanceScale
from dist_vsd.objectives.objective import Batch, Noised
from dist_vsd.objectives.vsd import Vsd, eps_of_particles
from dist_vsd.priors.architectures import RandomPrior
from dist_vsd.priors.prior import eps_pretrain, guided_prediction
from dist_vsd.score.lora_score import LoraScore
from dist_vsd.score.score_config import ScoreConfig

# Neighbours in bf16, whose step at 1 is 2^-7, and in fp16 (2^-10); 7.5 times their difference is between two neighbours.
STEPS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SHAPE = (4, 8, 8)


def prior_of(dtype, *answers):
    """Return a prior in a precision whose UNet answers each row of a batch with one of some numbers."""
    prior = RandomPrior("tiny", dtype=dtype)

    def forward(x, *_, **__):
        assert x.dtype == dtype
        rows = torch.tensor(answers[: len(x)], dtype=dtype).view(-1, 1, 1, 1)
        assert rows.flatten().tolist() == list(answers[: len(x)])  # which this precision holds
        return types.SimpleNamespace(sample=rows.expand(len(x), *SHAPE))

    prior.unet.forward = forward
    return prior


@pytest.mark.parametrize("dtype", STEPS)
def test_guidance_is_exact_where_two_predictions_are_neighbours_in_half_precision(dtype):
    step = STEPS[dtype]
    prior, x_t, t = prior_of(dtype, 1.0, 1.0 + step), torch.zeros(1, *SHAPE), torch.tensor([500])
    found = eps_pretrain(prior, x_t, t, prior.embed(["a duck"]), 7.5)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.full_like(found, 1.0 + 7.5 * step))
    assert float(torch.tensor(1.0 + 7.5 * step).to(dtype)) != 1.0 + 7.5 * step  # half precision has no such number


@pytest.mark.parametrize("dtype", STEPS)
def test_perp_neg_is_exact_there_too(dtype):
    step = STEPS[dtype]
    prior, x_t, t = prior_of(dtype, 1.0, 1.0 + step, 1.0), torch.zeros(1, *SHAPE), torch.tensor([500])
    y = prior.embed(["a duck"])
    y = type(y)(y.cond, y.uncond, (y.cond,), torch.full((1, 1), -0.5))
    found = guided_prediction(prior, x_t, t, y, 7.5)  # the negative is the unconditional: nothing is perpendicular
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.full_like(found, 1.0 + 7.5 * step))


@pytest.mark.parametrize("dtype", STEPS)
def test_the_gradient_of_vsd_is_the_exact_difference_of_two_networks_in_half_precision(dtype):
    step, w_t = STEPS[dtype], 0.3
    prior = prior_of(dtype, 1.0, 1.0 + step)  # asked for one row, as phi is, it answers 1
    score = LoraScore(prior.network, ScoreConfig(), torch.Generator().manual_seed(0))
    x_t, t, y = torch.zeros(1, *SHAPE), torch.tensor([500]), prior.embed(["a duck"])
    one = torch.ones(1, 1, 1, 1)
    noised = Noised(x_t, x_t, t, x_t, one, one, w_t * one, y, y.cond, torch.zeros(1, 16), None)
    objective = Vsd(types.SimpleNamespace(guidance=GuidanceScale(7.5, 7.5, 0.5), score=ScoreConfig()), prior, score)
    ((_, gradient),) = objective.cotangents(Batch([], None, 0.0, [], noised)).roots
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, torch.tensor(w_t) * torch.full_like(gradient, 7.5 * step))


def test_the_mixture_of_phi_with_and_without_the_camera_is_exact():
    step = STEPS[torch.bfloat16]
    score = LoraScore(prior_of(torch.bfloat16, 1.0 + step, 1.0).network, ScoreConfig(), torch.Generator().manual_seed(0))
    x_t, t = torch.zeros(1, *SHAPE), torch.tensor([500])
    y = RandomPrior("tiny").embed(["a duck"]).cond
    found = eps_of_particles(score, x_t, t, y, torch.ones(1, 16), 0.3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full_like(found, 1.0 + 0.7 * step), rtol=1e-7, atol=0)
