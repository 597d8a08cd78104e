"""objectives/: gradients and losses against hand-computed numbers and autograd."""

import pytest
import torch

from dist_vsd.diffusion.process import VariancePreserving, add_noise, v_from_eps, x_0_from_eps
from dist_vsd.objectives.clip import (
    augmented,
    blurred,
    checkerboard,
    clip_loss,
    draw_crops,
    fourier_noise,
    random_background,
    target_opacity,
    transmittance_loss,
    uniform_noise,
)  # fmt: skip
from dist_vsd.objectives.denoising import denoising_gradient
from dist_vsd.objectives.objective_configs import ClipConfig
from dist_vsd.objectives.sds import rescaled, sds_gradient
from dist_vsd.objectives.vsd import eps_of_particles, phi_loss
from dist_vsd.priors.clip import ClipScorer
from dist_vsd.priors.embedded.captions import caption
from dist_vsd.priors.prior import Text


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def test_the_denoising_gradient_of_a_linear_predictor_is_its_closed_form():
    # eps(x) = A x: the gradient of w ||A (alpha x_0 + sigma eps) - eps||^2 is 2 w alpha A^T (A x_t - eps).
    matrix, x_0, eps = numbers(5, 5), numbers(3, 5, seed=1), numbers(3, 5, seed=2)
    alpha_t = torch.tensor([[0.9], [0.5], [0.1]], dtype=torch.float64)
    sigma_t, w_t = (1 - alpha_t**2).sqrt(), torch.tensor([[1.0], [2.0], [0.5]], dtype=torch.float64)
    gradient = denoising_gradient(lambda x: x @ matrix.T, x_0, eps, alpha_t, sigma_t, w_t)
    residual = add_noise(x_0, eps, alpha_t, sigma_t) @ matrix.T - eps
    torch.testing.assert_close(gradient, 2 * w_t * alpha_t * (residual @ matrix))


def test_sds_is_the_denoising_gradient_without_the_jacobian():
    # Where the network's Jacobian is the identity both are one, up to the factor 2 alpha.
    x_0, eps = numbers(3, 5), numbers(3, 5, seed=1)
    alpha_t = torch.full((3, 1), 0.6, dtype=torch.float64)
    sigma_t, w_t = (1 - alpha_t**2).sqrt(), torch.ones(3, 1, dtype=torch.float64)
    kept = denoising_gradient(lambda x: x, x_0, eps, alpha_t, sigma_t, w_t)
    torch.testing.assert_close(kept, 2 * alpha_t * sds_gradient(add_noise(x_0, eps, alpha_t, sigma_t), eps, w_t))


def test_sds_toward_x_0_is_sds_weighted_by_sigma_over_alpha():
    """x_0 - (x_t - sigma eps_hat) / alpha = sigma / alpha (eps_hat - eps): MVDream's form, without rescaling."""
    x_0, eps, eps_hat = numbers(3, 5), numbers(3, 5, seed=1), numbers(3, 5, seed=2)
    alpha_t = torch.tensor([[0.9], [0.5], [0.1]], dtype=torch.float64)
    sigma_t = (1 - alpha_t**2).sqrt()
    estimate = x_0_from_eps(eps_hat, add_noise(x_0, eps, alpha_t, sigma_t), alpha_t, sigma_t)
    torch.testing.assert_close(x_0 - rescaled(estimate, numbers(3, 5, seed=3), 0.0), sds_gradient(eps_hat, eps, sigma_t / alpha_t))


def test_rescaling_takes_the_spread_of_a_shot_to_that_without_guidance_by_its_share():
    guided, cond = 3 * numbers(4, 2, 5), numbers(4, 2, 5, seed=1)
    whole = rescaled(guided, cond, 1.0, views_per_shot=2)
    for rows in (slice(2), slice(2, 4)):
        torch.testing.assert_close(whole[rows].std(), cond[rows].std())
        torch.testing.assert_close(whole[rows] / guided[rows], (cond[rows].std() / guided[rows].std()).expand(2, 2, 5))
    torch.testing.assert_close(rescaled(guided, cond, 0.5, views_per_shot=2), (guided + whole) / 2)


def test_the_loss_on_v_is_the_mean_square_error_of_v():
    x_0, eps, eps_phi = numbers(2, 7), numbers(2, 7, seed=1), numbers(2, 7, seed=2)
    process, t = VariancePreserving(torch.tensor([0.64, 0.09], dtype=torch.float64)), torch.tensor([0, 1])
    alpha_t, sigma_t = process.alpha_sigma(t, x_0)
    x_t = add_noise(x_0, eps, alpha_t, sigma_t)
    v = v_from_eps(eps, x_0, alpha_t, sigma_t)
    v_phi = alpha_t * eps_phi - sigma_t * (x_t - sigma_t * eps_phi) / alpha_t
    torch.testing.assert_close(phi_loss(process.error(eps_phi, x_0, x_t, eps, t, "v")), (v_phi - v).square().mean(1))


class Posed:
    """eps_phi that answers with its pose."""

    process = VariancePreserving(torch.tensor([0.5]).double())

    def __call__(self, x_t, t, y, pose, cameras=None):
        return pose[:, :1] * torch.ones_like(x_t)


@pytest.mark.parametrize(("entropy_weight", "expected"), [(0.0, 8.0), (0.25, 6.0), (1.0, 0.0)])
def test_entropic_distillation_mixes_in_the_score_that_sees_no_camera(entropy_weight, expected):
    pose, y = torch.full((2, 16), 8.0), Text(torch.zeros(2, 1, 1))
    mixed = eps_of_particles(Posed(), torch.zeros(2, 3), torch.zeros(2).long(), y, pose, entropy_weight)
    assert torch.equal(mixed, torch.full((2, 3), expected))


def test_transparency_is_rewarded_up_to_the_target_and_not_beyond():
    opacity = torch.tensor([0.9, 0.2, 0.05]).view(3, 1, 1, 1).expand(3, 1, 4, 4).clone().requires_grad_()
    loss = transmittance_loss(opacity, torch.full((3,), 0.2))
    torch.testing.assert_close(loss.detach(), torch.tensor([-0.1, -0.8, -0.8]))
    loss.sum().backward()
    assert bool((opacity.grad[0] > 0).all())
    assert not opacity.grad[2].any()


def test_the_opacity_target_falls_exponentially_and_grows_with_the_objects_area():
    config = ClipConfig(opacity_start=0.16, opacity_end=0.04, opacity_anneal=0.5)
    distance, fov = torch.tensor([4.0, 2.0]), torch.full((2,), 0.7)
    begin, middle, end, late = (target_opacity(config, progress, distance, fov) for progress in (0.0, 0.25, 0.5, 0.9))
    torch.testing.assert_close(middle / begin, torch.full((2,), 0.5))
    torch.testing.assert_close(end / begin, torch.full((2,), 0.25))
    torch.testing.assert_close(end, late)
    torch.testing.assert_close(end[1] / end[0], torch.tensor(4.0))  # half the distance, four times the area


@pytest.mark.parametrize("draw", [uniform_noise, checkerboard, fourier_noise, random_background])
def test_backgrounds_are_pictures_that_the_generator_alone_decides(draw):
    one, same, other = (draw(64, generator(seed)) for seed in (1, 1, 2))
    assert one.shape == (3, 64, 64)
    assert float(one.min()) >= 0
    assert float(one.max()) <= 1
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_checkerboard_has_eight_squares_a_side_of_two_colours():
    board = checkerboard(64, generator())
    assert len(torch.unique(board.flatten(1), dim=1).T) == 2
    assert torch.equal(board[:, :8, :8], board[:, :1, :1].expand(3, 8, 8))
    assert torch.equal(board[:, 0, ::8][:, 0], board[:, 0, ::8][:, 2])
    assert not torch.equal(board[:, 0, 0], board[:, 0, 8])


def test_blurring_keeps_plain_colours_and_spreads_a_point_by_its_width():
    plain = torch.tensor([0.2, 0.5, 0.9])[:, None, None].expand(3, 16, 16)
    torch.testing.assert_close(blurred(plain, 2.0, 4), plain)
    point = torch.zeros(3, 33, 33)
    point[:, 16, 16] = 1.0
    spread = blurred(point, 2.0, 10)[0]
    offsets = torch.arange(33) - 16.0
    assert float(spread.sum()) == pytest.approx(1.0, abs=1e-5)
    assert float((spread.sum(0) * offsets**2).sum()) == pytest.approx(4.0, rel=0.02)


def test_crops_lie_over_backgrounds_and_an_opaque_picture_hides_them():
    foreground, opacity = torch.full((3, 32, 32), 0.7), torch.ones(1, 32, 32)
    config = ClipConfig(num_crops=3)
    crops = augmented(foreground, opacity, *draw_crops(32, 16, config, generator()), config.crop_fraction)
    torch.testing.assert_close(crops, torch.full((3, 3, 16, 16), 0.7))
    nothing = torch.zeros(3, 32, 32), torch.zeros(1, 32, 32)
    seen_through = augmented(*nothing, *draw_crops(32, 16, config, generator()), config.crop_fraction)
    assert not torch.equal(seen_through[0], seen_through[1])


def test_clips_loss_is_lower_for_the_picture_that_the_prompt_names_and_its_gradient_reaches_the_picture():
    from dist_vsd.cameras import look_at_origin
    from dist_vsd.priors.embedded.render import render_object
    from dist_vsd.priors.embedded.scenes import NUM_PROPORTIONS

    scorer, one = ClipScorer.load(), torch.ones(1)
    camera = look_at_origin(30 * one, 15 * one, 2.9 * one, 41 * one)
    pictures = torch.cat([render_object(name, ["red"], torch.zeros(1, NUM_PROPORTIONS), camera, 64) for name in ("car", "duck")])
    pictures.requires_grad_()
    text = scorer.embed_texts([caption("car", "red")])[0]
    corner, background = draw_crops(64, scorer.image_size, ClipConfig(), generator(3))
    same = torch.stack([corner] * 2), torch.stack([background] * 2)
    loss = clip_loss(scorer, text, pictures, torch.ones(2, 1, 64, 64), ClipConfig(), *same)
    assert bool(loss[0] < loss[1] - 0.2)
    loss.sum().backward()
    assert float(pictures.grad.abs().sum()) > 0
