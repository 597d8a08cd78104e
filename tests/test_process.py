"""diffusion/process.py: sums done by hand, and the identities of both processes in fp64."""

import pytest
import torch

from dist_vsd.diffusion.process import (
    LEAST_ALPHA,
    LEAST_FRACTION,
    RectifiedFlow,
    VariancePreserving,
    add_noise,
    eps_from_score,
    eps_from_v,
    eps_from_velocity,
    shifted,
    v_from_eps,
    velocity,
    x_0_from_eps,
    x_0_from_v,
    x_0_from_velocity,
)
from dist_vsd.diffusion.timesteps import draw_timesteps
from dist_vsd.objectives.vsd import phi_loss

LINEAR_3 = {"num_train_timesteps": 3, "beta_start": 0.1, "beta_end": 0.3, "beta_schedule": "linear"}
STABLE_DIFFUSION = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def noised(count=6):
    """Return fp64 x_0, eps, alpha_t, sigma_t and x_t of a few timesteps from one end to the other."""
    process = VariancePreserving.from_scheduler_config(STABLE_DIFFUSION)
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, count, 4, 3, 3, generator=generator, dtype=torch.float64)
    alpha_t, sigma_t = process.alpha_sigma(torch.linspace(0, 999, count).long(), x_0)
    return x_0, eps, alpha_t, sigma_t, add_noise(x_0, eps, alpha_t, sigma_t)


def assert_equal_in_fp64(one, other):
    # 16 digits, of which x_0 from eps loses one to the division by the smallest alpha_t, 0.07.
    torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_a_linear_schedule_of_three_steps_is_the_product_of_one_minus_beta():
    process = VariancePreserving.from_scheduler_config(LINEAR_3)
    by_hand = torch.tensor([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], dtype=torch.float64)
    # diffusers multiplies in fp32: three betas and three products, each rounded to 6e-8.
    torch.testing.assert_close(process.alphas_cumprod, by_hand, rtol=5e-7, atol=0)
    assert process.num_timesteps == 3
    assert process.prediction_type == "epsilon"


def test_scaled_linear_betas_are_evenly_spaced_in_their_square_roots():
    process = VariancePreserving.from_scheduler_config(STABLE_DIFFUSION)
    product, by_formula = 1.0, []
    for step in range(1000):
        root = 0.00085**0.5 + step / 999 * (0.012**0.5 - 0.00085**0.5)
        product *= 1 - root**2
        by_formula.append(product)
    # A thousand fp32 products of diffusers, each rounded to 6e-8.
    torch.testing.assert_close(process.alphas_cumprod, torch.tensor(by_formula, dtype=torch.float64), rtol=6e-5, atol=0)


def test_alpha_and_sigma_are_a_point_of_the_unit_circle_shaped_to_multiply():
    process = VariancePreserving.from_scheduler_config(STABLE_DIFFUSION)
    alpha_t, sigma_t = process.alpha_sigma(torch.tensor([0, 500, 999]), torch.zeros(3, 4, 8, 8, dtype=torch.float64))
    assert alpha_t.shape == sigma_t.shape == (3, 1, 1, 1)
    assert_equal_in_fp64(alpha_t.square() + sigma_t.square(), torch.ones(3, 1, 1, 1, dtype=torch.float64))
    assert torch.equal(alpha_t.flatten(), process.alphas_cumprod[[0, 500, 999]].sqrt())
    assert process.alpha_sigma(torch.tensor([0]), torch.zeros(1, 2))[0].dtype == torch.float32


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
    process = VariancePreserving.from_scheduler_config(STABLE_DIFFUSION | {"prediction_type": "v_prediction"})
    assert process.prediction_type == "v_prediction"
    x_0, eps, alpha_t, sigma_t, x_t = noised()
    t = torch.linspace(0, 999, len(x_0)).long()
    assert_equal_in_fp64(process.eps(v_from_eps(eps, x_0, alpha_t, sigma_t), x_t, t), eps)


def test_a_prediction_of_eps_passes_through_untouched():
    process = VariancePreserving.from_scheduler_config(STABLE_DIFFUSION)
    prediction = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(process.eps(prediction, torch.zeros(2, 4), torch.tensor([0, 999])), prediction)


def test_a_prior_that_predicts_something_else_is_refused_with_its_name():
    with pytest.raises(ValueError, match="epsilon or v_prediction, got 'sample'"):
        VariancePreserving.from_scheduler_config(STABLE_DIFFUSION | {"prediction_type": "sample"})


def test_the_scheduler_that_ships_is_stable_diffusions():
    from dist_vsd.priors.embedded.networks import build_scheduler

    shipped = VariancePreserving.from_scheduler_config(build_scheduler().config)
    assert torch.equal(shipped.alphas_cumprod, VariancePreserving.from_scheduler_config(STABLE_DIFFUSION).alphas_cumprod)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STABLE = VariancePreserving.from_scheduler_config(STABLE_DIFFUSION)
STABLE_V = VariancePreserving.from_scheduler_config(STABLE_DIFFUSION | {"prediction_type": "v_prediction"})
PROCESSES = {"eps": STABLE, "v": STABLE_V, "flow": RectifiedFlow(), "unshifted flow": RectifiedFlow(1.0)}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def noised_by(process, count=16):
    """Return fp64 x_0, eps, x_t and t over the whole range of a process."""
    x_0, eps = numbers(count, 4, 3, 3), numbers(count, 4, 3, 3, seed=1)
    t = process.draw_t((torch.arange(count).double() + 0.5) / count, 0.0, 1.0)
    return x_0, eps, add_noise(x_0, eps, *process.alpha_sigma(t, x_0)), t


def test_a_rectified_flow_by_hand():
    x_0, eps, s = (torch.tensor([value], dtype=torch.float64) for value in (1.0, 3.0, 0.25))
    x_t = add_noise(x_0, eps, *RectifiedFlow().alpha_sigma(s, x_0))
    v = velocity(eps, x_0)
    assert (float(x_t), float(v)) == (1.5, 2.0)  # three quarters of 1 and a quarter of 3; 3 - 1
    assert (float(eps_from_velocity(v, x_t, s)), float(x_0_from_velocity(v, x_t, s))) == (3.0, 1.0)
    # 3 u / (1 + 2 u): a half becomes three quarters, and both ends stay.
    assert shifted(torch.tensor([0.0, 0.5, 1.0]), 3.0).tolist() == [0.0, 0.75, 1.0]
    assert torch.equal(shifted(s, 1.0), s)


@every_process
def test_what_a_network_should_predict_is_the_eps_that_was_drawn(process):
    x_0, eps, x_t, t = noised_by(process)
    assert_equal_in_fp64(process.eps(process.target(x_0, eps, t), x_t, t), eps)


@every_process
def test_half_precision_keeps_its_dtype_and_the_shape_that_multiplies(process):
    t = process.draw_t(torch.rand(3), 0.1, 0.9)
    for part in process.alpha_sigma(t, torch.zeros(3, 4, 8, 8, dtype=torch.bfloat16)):
        assert (part.shape, part.dtype) == ((3, 1, 1, 1), torch.bfloat16)


def test_draws_of_a_variance_preserving_process_are_those_of_its_timesteps_to_the_bit():
    uniform = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(STABLE.draw_t(uniform, 0.02, 0.98), draw_timesteps(uniform, 0.02, 0.98, 1000))
    assert torch.equal(STABLE.fraction(torch.tensor([0, 500, 999])), torch.tensor([0.0, 0.5, 0.999]))


def test_draws_of_a_flow_are_even_in_the_fraction_before_the_shift_and_never_free_of_noise():
    ends = torch.tensor([0.0, 0.5, 1 - 2.0**-24])  # the lowest and the highest that torch.rand returns
    assert RectifiedFlow(1.0).draw_t(ends, 0.2, 0.8).tolist() == pytest.approx([0.2, 0.5, 0.8], abs=1e-6)
    assert RectifiedFlow(3.0).draw_t(ends, 0.0, 1.0).tolist() == pytest.approx([shifted(LEAST_FRACTION, 3.0), 0.75, 1.0], abs=1e-6)
    s = RectifiedFlow(3.0).draw_t(torch.rand(20_000, generator=torch.Generator().manual_seed(0)), 0.0, 1.0)
    assert 0 < s.min() <= s.max() <= 1
    assert torch.equal(RectifiedFlow().fraction(s), s)
    # Half of all draws are below s = 3/4; four standard deviations of a share of 20,000 are 0.014.
    assert float((s < 0.75).float().mean()) == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize("shift", [0.0, -3.0, float("nan"), float("inf")])
def test_a_shift_that_is_not_positive_is_refused_in_one_line(shift):
    with pytest.raises(ValueError, match=f"shift must be a positive number, got {shift}: use 1") as error:
        RectifiedFlow(shift)
    assert "\n" not in str(error.value)


@every_process
@pytest.mark.parametrize("loss", ["eps", "v"])
def test_a_perfect_prediction_has_no_error_and_an_imperfect_one_that_of_the_quantity_which_is_asked_for(process, loss):
    x_0, eps, x_t, t = noised_by(process)
    target, off = process.target(x_0, eps, t), numbers(*x_0.shape, seed=2)
    assert_equal_in_fp64(process.error(target, x_0, x_t, eps, t, loss), torch.zeros_like(x_0))
    alpha_t, _ = process.alpha_sigma(t, x_0)
    predicts = "eps" if process is STABLE else "v"
    # Both kinds of v: Delta eps = alpha_t Delta v.
    factor = {("eps", "eps"): 1.0, ("v", "v"): 1.0, ("v", "eps"): alpha_t, ("eps", "v"): 1 / alpha_t.clamp_min(LEAST_ALPHA)}
    assert_equal_in_fp64(process.error(target + off, x_0, x_t, eps, t, loss), factor[predicts, loss] * off)


@every_process
def test_without_a_loss_the_error_is_of_what_the_processes_own_networks_are_trained_with(process):
    x_0, eps, x_t, t = noised_by(process)
    own = "v" if isinstance(process, RectifiedFlow) else "eps"
    prediction = numbers(*x_0.shape, seed=2)
    errors = {loss: process.error(prediction, x_0, x_t, eps, t, loss) for loss in ("", "eps", "v")}
    assert torch.equal(errors[""], errors[own])


@pytest.mark.parametrize("rescale", [False, True], ids=["stable_diffusion", "zero_terminal_snr"])
def test_the_loss_on_v_weighs_no_time_more_than_a_hundredfold_and_its_fp16_squares_are_finite(rescale):
    process = VariancePreserving.from_scheduler_config(STABLE_DIFFUSION | {"rescale_betas_zero_snr": rescale})
    t, zeros = torch.arange(1000), torch.zeros(1000, 1)
    weight = phi_loss(process.error(torch.ones(1000, 1), zeros, zeros, zeros, t, "v"))
    assert float(weight.max()) == pytest.approx(1 / LEAST_ALPHA**2)
    assert torch.equal(weight, weight.sort().values)  # it rises with t
    half = process.error(torch.full((1000, 1), 25.0).half(), zeros.half(), zeros.half(), zeros.half(), t, "v")
    assert half.dtype == torch.float16
    assert half.square().isfinite().all()


def test_a_network_that_predicts_v_is_not_divided_at_the_end_of_a_zero_terminal_schedule():
    process = VariancePreserving.from_scheduler_config(
        STABLE_DIFFUSION | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    )
    x_0, eps, t = numbers(1, 4), numbers(1, 4, seed=1), torch.tensor([999])
    assert float(process.alpha_sigma(t, x_0)[0]) == 0
    # There v = -x_0, and x_t = eps.
    assert torch.equal(process.error(torch.zeros_like(x_0), x_0, eps, eps, t, "v"), x_0)


def test_a_process_goes_to_a_device_with_what_it_holds():
    assert STABLE_V.to("meta").alphas_cumprod.device.type == "meta"
    assert STABLE_V.to("meta").prediction_type == "v_prediction"
    assert RectifiedFlow(2.0).to("meta") == RectifiedFlow(2.0)
