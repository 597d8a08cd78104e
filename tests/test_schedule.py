"""diffusion/schedule.py: sums done by hand, and the identities of the variance-preserving process in fp64."""

import pytest
import torch

from dist_vsd.diffusion.schedule import (
    NoiseSchedule,
    add_noise,
    eps_from_score,
    eps_from_v,
    v_from_eps,
    x_0_from_eps,
    x_0_from_v,
)

LINEAR_3 = {"num_train_timesteps": 3, "beta_start": 0.1, "beta_end": 0.3, "beta_schedule": "linear"}
STABLE_DIFFUSION = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def noised(count=6):
    """Return fp64 x_0, eps, alpha_t, sigma_t and x_t of a few timesteps from one end to the other."""
    schedule = NoiseSchedule.from_scheduler_config(STABLE_DIFFUSION)
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, count, 4, 3, 3, generator=generator, dtype=torch.float64)
    alpha_t, sigma_t = schedule.alpha_sigma(torch.linspace(0, 999, count).long(), x_0)
    return x_0, eps, alpha_t, sigma_t, add_noise(x_0, eps, alpha_t, sigma_t)


def assert_equal_in_fp64(one, other):
    # 16 digits, of which x_0 from eps loses one to the division by the smallest alpha_t, 0.07.
    torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_a_linear_schedule_of_three_steps_is_the_product_of_one_minus_beta():
    schedule = NoiseSchedule.from_scheduler_config(LINEAR_3)
    by_hand = torch.tensor([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], dtype=torch.float64)
    # diffusers multiplies in fp32: three betas and three products, each rounded to 6e-8.
    torch.testing.assert_close(schedule.alphas_cumprod, by_hand, rtol=5e-7, atol=0)
    assert schedule.num_timesteps == 3
    assert schedule.prediction_type == "epsilon"


def test_scaled_linear_betas_are_evenly_spaced_in_their_square_roots():
    schedule = NoiseSchedule.from_scheduler_config(STABLE_DIFFUSION)
    product, by_formula = 1.0, []
    for step in range(1000):
        root = 0.00085**0.5 + step / 999 * (0.012**0.5 - 0.00085**0.5)
        product *= 1 - root**2
        by_formula.append(product)
    # A thousand fp32 products of diffusers, each rounded to 6e-8.
    torch.testing.assert_close(schedule.alphas_cumprod, torch.tensor(by_formula, dtype=torch.float64), rtol=6e-5, atol=0)


def test_alpha_and_sigma_are_a_point_of_the_unit_circle_shaped_to_multiply():
    schedule = NoiseSchedule.from_scheduler_config(STABLE_DIFFUSION)
    alpha_t, sigma_t = schedule.alpha_sigma(torch.tensor([0, 500, 999]), torch.zeros(3, 4, 8, 8, dtype=torch.float64))
    assert alpha_t.shape == sigma_t.shape == (3, 1, 1, 1)
    assert_equal_in_fp64(alpha_t.square() + sigma_t.square(), torch.ones(3, 1, 1, 1, dtype=torch.float64))
    assert torch.equal(alpha_t.flatten(), schedule.alphas_cumprod[[0, 500, 999]].sqrt())
    assert schedule.alpha_sigma(torch.tensor([0]), torch.zeros(1, 2))[0].dtype == torch.float32


def test_noising_and_v_by_hand():
    one = torch.ones(1, dtype=torch.float64)
    x_0, eps, alpha_t, sigma_t = 1 * one, 2 * one, 0.6 * one, 0.8 * one
    x_t = add_noise(x_0, eps, alpha_t, sigma_t)
    assert_equal_in_fp64(x_t, 2.2 * one)
    v = v_from_eps(eps, x_0, alpha_t, sigma_t)
    assert_equal_in_fp64(v, 0.4 * one)
    assert_equal_in_fp64(eps_from_v(v, x_t, alpha_t, sigma_t), 2 * one)
    assert_equal_in_fp64(x_0_from_v(v, x_t, alpha_t, sigma_t), 1 * one)


def test_v_and_eps_both_give_back_what_was_noised_at_every_level():
    x_0, eps, alpha_t, sigma_t, x_t = noised()
    v = v_from_eps(eps, x_0, alpha_t, sigma_t)
    assert_equal_in_fp64(eps_from_v(v, x_t, alpha_t, sigma_t), eps)
    assert_equal_in_fp64(x_0_from_v(v, x_t, alpha_t, sigma_t), x_0)
    assert_equal_in_fp64(x_0_from_eps(eps, x_t, alpha_t, sigma_t), x_0)


def test_eps_is_minus_sigma_times_the_score_of_the_noise():
    x_0, eps, alpha_t, sigma_t, x_t = noised()
    # p(x_t | x_0) = N(alpha_t x_0, sigma_t^2): its score is -(x_t - alpha_t x_0) / sigma_t^2.
    score = -(x_t - alpha_t * x_0) / sigma_t.square()
    # The smallest sigma_t, 0.03, is divided by twice.
    torch.testing.assert_close(eps_from_score(score, sigma_t), eps, rtol=0, atol=1e-12)


def test_a_v_prediction_scheduler_is_read_and_its_output_turned_into_eps():
    schedule = NoiseSchedule.from_scheduler_config(STABLE_DIFFUSION | {"prediction_type": "v_prediction"})
    assert schedule.prediction_type == "v_prediction"
    x_0, eps, alpha_t, sigma_t, x_t = noised()
    t = torch.linspace(0, 999, len(x_0)).long()
    assert_equal_in_fp64(schedule.eps_from_prediction(v_from_eps(eps, x_0, alpha_t, sigma_t), x_t, t), eps)


def test_a_prediction_of_eps_passes_through_untouched():
    schedule = NoiseSchedule.from_scheduler_config(STABLE_DIFFUSION)
    prediction = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(schedule.eps_from_prediction(prediction, torch.zeros(2, 4), torch.tensor([0, 999])), prediction)


def test_a_prior_that_predicts_something_else_is_refused_with_its_name():
    with pytest.raises(ValueError, match="epsilon or v_prediction, got 'sample'"):
        NoiseSchedule.from_scheduler_config(STABLE_DIFFUSION | {"prediction_type": "sample"})


def test_the_scheduler_that_ships_is_stable_diffusions():
    from dist_vsd.priors.embedded.networks import build_scheduler

    shipped = NoiseSchedule.from_scheduler_config(build_scheduler().config)
    assert torch.equal(shipped.alphas_cumprod, NoiseSchedule.from_scheduler_config(STABLE_DIFFUSION).alphas_cumprod)
