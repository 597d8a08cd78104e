"""priors/gaussian_mixture.py: densities and scores against scipy.stats, autograd and closed forms, in fp64."""

import numpy as np
import pytest
import torch
from scipy import stats

from dist_vsd.diffusion.process import RectifiedFlow, VariancePreserving, add_noise
from dist_vsd.priors.gaussian_mixture import GaussianMixturePrior, mixture_score
from dist_vsd.priors.prior import eps_pretrain

# alpha_t^2 of five levels, from almost clean to almost noise; the third has alpha = 0.6 and sigma = 0.8.
VP = VariancePreserving(torch.tensor([0.9999, 0.9, 0.36, 0.05, 1e-4], dtype=torch.float64))
MEANS = torch.tensor([[2.0, 2.0, 0.0], [-2.0, 1.0, 1.0], [0.0, -3.0, 0.5]], dtype=torch.float64)
VARIANCES = torch.tensor([0.3, 1.0, 0.05], dtype=torch.float64).square()
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)
ROOTS = torch.tensor(np.random.default_rng(0).normal(size=(3, 3, 3)))
COVARIANCES = ROOTS @ ROOTS.mT + 0.1 * EYE
ROUND = GaussianMixturePrior(MEANS, VARIANCES, WEIGHTS, VP)
FULL = GaussianMixturePrior(MEANS, COVARIANCES, WEIGHTS, VP)
FLOW = GaussianMixturePrior(MEANS, COVARIANCES, WEIGHTS, RectifiedFlow())
both = pytest.mark.parametrize("prior", [ROUND, FULL], ids=["isotropic", "full"])


def points(count=50, num_dimensions=3):
    return 3 * torch.randn(count, num_dimensions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def matrices(prior):
    return prior.covariances if prior.covariances.ndim == 3 else prior.covariances[:, None, None] * EYE


def reference_log_density(prior, x, alpha_t=1.0, sigma_t=0.0):
    """scipy's density of the noised mixture; shares no code with the prior."""
    noised = alpha_t**2 * matrices(prior) + sigma_t**2 * EYE
    components = [stats.multivariate_normal(alpha_t * mean, covariance) for mean, covariance in zip(MEANS, noised, strict=True)]
    logs = np.stack([component.logpdf(x.numpy()) for component in components], -1) + np.log(WEIGHTS.numpy())
    return torch.tensor(np.logaddexp.reduce(logs, -1))


@both
def test_the_density_is_that_of_scipy(prior):
    torch.testing.assert_close(prior.log_density(points()), reference_log_density(prior, points()), rtol=1e-10, atol=1e-10)


@both
@pytest.mark.parametrize("t", range(5))
def test_the_noised_density_is_that_of_scipy(prior, t):
    alpha_t, sigma_t = float(VP.alphas_cumprod[t].sqrt()), float((1 - VP.alphas_cumprod[t]).sqrt())
    reference = reference_log_density(prior, points(), alpha_t, sigma_t)
    torch.testing.assert_close(prior.log_density(points(), torch.full((50,), t)), reference, rtol=1e-10, atol=1e-10)


@both
@pytest.mark.parametrize("t", range(5))
def test_eps_is_minus_sigma_times_the_gradient_of_the_noised_log_density(prior, t):
    x_t, timesteps = points().requires_grad_(), torch.full((50,), t)
    (score,) = torch.autograd.grad(prior.log_density(x_t, timesteps).sum(), x_t)
    sigma_t = (1 - VP.alphas_cumprod[t]).sqrt()
    # Scores reach 3 / 0.05^2 = 1,200 here; fp64 keeps 12 digits of the differences.
    torch.testing.assert_close(prior.eps(x_t.detach(), timesteps), -sigma_t * score, rtol=1e-9, atol=1e-9)


def test_round_components_given_as_full_covariances_have_the_same_scores():
    full = GaussianMixturePrior(MEANS, VARIANCES[:, None, None] * EYE, WEIGHTS, VP)
    t = torch.arange(50) % 5
    torch.testing.assert_close(full.eps(points(), t), ROUND.eps(points(), t), rtol=1e-12, atol=1e-12)  # the same sums in fp64
    torch.testing.assert_close(full.log_density(points(), t), ROUND.log_density(points(), t), rtol=1e-12, atol=1e-12)


def test_the_gradient_of_eps_reaches_x_t():
    torch.autograd.gradcheck(lambda x_t: FULL.eps(x_t, torch.arange(5)), points(5).requires_grad_())


@both
def test_each_point_of_a_batch_has_its_own_timestep(prior):
    x_t = points(5)
    together = prior.eps(x_t, torch.arange(5))
    alone = torch.cat([prior.eps(x_t[i : i + 1], torch.tensor([i])) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)  # the same sums in fp64


def test_eps_of_a_single_gaussian_by_hand():
    one = torch.ones(1, 1, dtype=torch.float64)
    prior = GaussianMixturePrior(2 * one, 0.25 * one[0], one[0], VP)
    # alpha = 0.6, sigma = 0.8: x_t - alpha mu = 3.2 - 1.2 = 2, its variance 0.36 * 0.25 + 0.64 = 0.73, eps = 0.8 * 2 / 0.73.
    eps = prior.eps(3.2 * one, torch.tensor([2]))
    torch.testing.assert_close(eps, 1.6 / 0.73 * one, rtol=1e-13, atol=0)


def test_eps_of_a_standard_normal_is_sigma_times_x_at_every_level():
    prior = GaussianMixturePrior(torch.zeros(1, 16).double(), torch.ones(1).double(), torch.ones(1).double(), VP)
    x_t, t = points(5, 16), torch.arange(5)
    torch.testing.assert_close(prior.eps(x_t, t), VP.alpha_sigma(t, x_t)[1] * x_t, rtol=1e-13, atol=0)


def test_far_from_every_mode_the_score_is_that_of_one_component():
    # 1e4 away every density underflows; the widest component wins there, and its score is (mu - x) / s^2.
    x = torch.tensor([[1e4, 0.0, 0.0]], dtype=torch.float64)
    score = mixture_score(x, MEANS[None], VARIANCES[None, :, None], WEIGHTS)
    torch.testing.assert_close(score, MEANS[1:2] - x, rtol=1e-12, atol=0)


@both
def test_samples_have_the_moments_of_the_mixture(prior):
    drawn = prior.sample(40_000, torch.Generator().manual_seed(0))
    second = torch.einsum("k,kde->de", WEIGHTS, matrices(prior) + MEANS[:, :, None] * MEANS[:, None, :])
    # Standard deviations of the coordinates are below 3, of their products below 10: over sqrt(40,000) = 200, and four of them.
    torch.testing.assert_close(drawn.mean(0), WEIGHTS @ MEANS, rtol=0, atol=0.06)
    torch.testing.assert_close(drawn.T @ drawn / 40_000, second, rtol=0, atol=0.2)
    assert torch.equal(drawn, prior.sample(40_000, torch.Generator().manual_seed(0)))


@both
def test_a_marginal_is_the_mixture_of_some_coordinates(prior):
    marginal = prior.marginal((2, 0))
    x = points(5, 2)
    references = [stats.multivariate_normal(MEANS[k, [2, 0]], matrices(prior)[k][[2, 0]][:, [2, 0]]).pdf(x) for k in range(3)]
    density = sum(weight * reference for weight, reference in zip(WEIGHTS.tolist(), references, strict=True))
    torch.testing.assert_close(marginal.log_density(x).exp(), torch.tensor(density), rtol=1e-10, atol=1e-15)


def test_encode_and_decode_are_the_identity():
    assert torch.equal(ROUND.encode(points()), points())
    assert torch.equal(ROUND.decode(points()), points())


def test_without_guidance_eps_pretrain_is_the_mixtures_own_eps_and_with_it_it_is_refused():
    t = torch.arange(5)
    assert torch.equal(eps_pretrain(FULL, points(5), t, FULL.no_text(5), 1.0), FULL.eps(points(5), t))
    with pytest.raises(ValueError, match=r"guidance_scale 7\.5 needs .*: use 1"):
        eps_pretrain(FULL, points(5), t, FULL.no_text(5), 7.5)


@pytest.mark.parametrize("s", [0.001, 0.3, 0.7, 1.0])
def test_under_a_flow_eps_and_density_are_those_of_scipy_and_autograd(s):
    x_t, t = points().requires_grad_(), torch.full((50,), s, dtype=torch.float64)
    log_density = FLOW.log_density(x_t, t)
    torch.testing.assert_close(log_density, reference_log_density(FLOW, x_t.detach(), 1 - s, s), rtol=1e-10, atol=1e-10)
    (score,) = torch.autograd.grad(log_density.sum(), x_t)
    torch.testing.assert_close(FLOW.eps(x_t.detach(), t), -s * score, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("covariances", [VARIANCES, COVARIANCES], ids=["isotropic", "full"])
@pytest.mark.parametrize(
    "process", [VP, VariancePreserving(VP.alphas_cumprod, "v_prediction"), RectifiedFlow()], ids=["eps", "v", "velocity"]
)
def test_what_is_predicted_becomes_the_exact_eps_whatever_is_predicted(process, covariances):
    prior = GaussianMixturePrior(MEANS, covariances, WEIGHTS, process)
    t = process.draw_t((torch.arange(50).double() + 0.5) / 50, 0.0, 1.0)
    assert t.unique().numel() >= 5
    torch.testing.assert_close(process.eps(prior.predict(points(), t), points(), t), prior.eps(points(), t), rtol=1e-10, atol=1e-10)


def test_the_velocity_of_a_flow_is_the_mean_of_eps_minus_x_0_at_pure_noise_too():
    # At s = 1 x_t says nothing of x_0: v = x_t - E[x_0].
    v = FLOW.predict(points(), torch.ones(50))
    torch.testing.assert_close(v, points() - WEIGHTS @ MEANS, rtol=1e-12, atol=1e-12)
    # Elsewhere by a mean over draws near x_t, in one dimension: 4 million of them, those within 0.02.
    one = torch.ones(1, dtype=torch.float64)
    prior = GaussianMixturePrior(torch.stack([-one, 2 * one]), 0.25 * torch.ones(2).double(), torch.tensor([0.3, 0.7]), RectifiedFlow())
    generator, s = torch.Generator().manual_seed(0), torch.tensor([0.4], dtype=torch.float64)
    x_0, eps = prior.sample(4_000_000, generator), torch.randn(4_000_000, 1, generator=generator, dtype=torch.float64)
    near = (add_noise(x_0, eps, *prior.process.alpha_sigma(s, x_0)) - 0.5).abs() < 0.02
    # Some 40,000 draws of a standard deviation below 2: four standard errors are 0.04.
    torch.testing.assert_close(prior.predict(0.5 * one[None], s)[0, 0], (eps - x_0)[near].mean(), rtol=0, atol=0.04)


SKEWED = COVARIANCES.clone()
SKEWED[1, 0, 2] += 0.1
NOT_DEFINITE = COVARIANCES.clone()
NOT_DEFINITE[2] -= 20 * EYE


@pytest.mark.parametrize(
    ("means", "covariances", "weights", "rule"),
    [
        (MEANS, VARIANCES, torch.tensor([0.5, 0.3, 0.1]), "weights must sum to 1, got 0.9"),
        (MEANS, VARIANCES, torch.tensor([0.5, 0.3, 0.3]), "weights must sum to 1, got 1.1"),
        (MEANS, VARIANCES, torch.tensor([0.8, 0.4, -0.2]), "weights must be above 0, got -0.2"),
        (MEANS, VARIANCES, torch.tensor([0.5, 0.5]), r"3 mean\(s\) needs as many weights, got the shape \(2,\)"),
        (MEANS, VARIANCES[:2], WEIGHTS, r"shape \(3,\) or \(3, 3, 3\), got \(2,\)"),
        (MEANS, COVARIANCES[:, :2], WEIGHTS, r"shape \(3,\) or \(3, 3, 3\), got \(3, 2, 3\)"),
        (MEANS[0], VARIANCES, WEIGHTS, r"means must have the shape \(K, D\) .*, got \(3,\)"),
        (MEANS * torch.inf, VARIANCES, WEIGHTS, "means must be finite numbers, got inf"),
        (MEANS, torch.tensor([0.1, 0.0, 0.2]), WEIGHTS, "positive definite, got the variance 0 along an axis of component 1"),
        (MEANS, NOT_DEFINITE, WEIGHTS, "positive definite, got the variance -.* along an axis of component 2"),
        (MEANS, SKEWED, WEIGHTS, "covariances must be symmetric, got .* for component 1"),
    ],
)
def test_what_is_no_mixture_is_refused(means, covariances, weights, rule):
    with pytest.raises(ValueError, match=rule) as error:
        GaussianMixturePrior(means, covariances, weights, VP)
    assert "\n" not in str(error.value)
