"""priors/gaussian_mixture.py: exact scores against autograd of an independent density and against closed forms, in fp64."""

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from dist_vsd.diffusion.schedule import NoiseSchedule
from dist_vsd.priors.gaussian_mixture import GaussianMixturePrior, mixture_score

# alpha_t^2 of five levels, from almost clean to almost noise; the third has alpha = 0.6 and sigma = 0.8.
SCHEDULE = NoiseSchedule(torch.tensor([0.9999, 0.9, 0.36, 0.05, 1e-4], dtype=torch.float64))
MEANS = torch.tensor([[2.0, 2.0, 0.0], [-2.0, 1.0, 1.0], [0.0, -3.0, 0.5]], dtype=torch.float64)
STD = torch.tensor([0.3, 1.0, 0.05], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def log_density(x, means, std, weights):
    """torch.distributions' own density of the mixture; shares no code with the prior."""
    return MixtureSameFamily(Categorical(weights), Independent(Normal(means, std[..., None]), 1)).log_prob(x)


def gradient(function, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def test_the_score_is_the_gradient_of_the_log_density():
    x = 3 * torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = gradient(lambda x: log_density(x, MEANS, STD, WEIGHTS), x)
    # Scores reach 3 / 0.05^2 = 1,200 here; fp64 keeps 12 digits of the differences.
    torch.testing.assert_close(mixture_score(x, MEANS[None], STD.square()[None], WEIGHTS), reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("t", range(5))
def test_eps_is_minus_sigma_times_the_score_of_the_noised_mixture(t):
    alpha_t, sigma_t = SCHEDULE.alphas_cumprod[t].sqrt(), (1 - SCHEDULE.alphas_cumprod[t]).sqrt()
    x_t = 2 * torch.randn(50, 3, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    std_t = ((alpha_t * STD).square() + sigma_t.square()).sqrt()
    reference = -sigma_t * gradient(lambda x: log_density(x, alpha_t * MEANS, std_t, WEIGHTS), x_t)
    eps = GaussianMixturePrior(MEANS, STD, WEIGHTS, SCHEDULE).eps(x_t, torch.full((50,), t))
    torch.testing.assert_close(eps, reference, rtol=1e-10, atol=1e-10)


def test_each_point_of_a_batch_has_its_own_timestep():
    prior = GaussianMixturePrior(MEANS, STD, WEIGHTS, SCHEDULE)
    x_t = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = prior.eps(x_t, torch.arange(5))
    alone = torch.cat([prior.eps(x_t[i : i + 1], torch.tensor([i])) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)  # the same sums in fp64


def test_eps_of_a_single_gaussian_by_hand():
    one = torch.ones(1, 1, dtype=torch.float64)
    prior = GaussianMixturePrior(2 * one, 0.5 * one[0], one[0], SCHEDULE)
    # alpha = 0.6, sigma = 0.8: x_t - alpha mu = 3.2 - 1.2 = 2, its variance 0.36 * 0.25 + 0.64 = 0.73, eps = 0.8 * 2 / 0.73.
    eps = prior.eps(3.2 * one, torch.tensor([2]))
    torch.testing.assert_close(eps, 1.6 / 0.73 * one, rtol=1e-13, atol=0)


def test_eps_of_a_point_mass_is_the_noise_that_was_added():
    mean = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    eps = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.arange(5)
    alpha_t, sigma_t = SCHEDULE.alpha_sigma(t, eps)
    # The smallest sigma_t is 0.01: x_t - alpha_t mu loses two digits.
    predicted = GaussianMixturePrior(mean, zero, one, SCHEDULE).eps(alpha_t * mean + sigma_t * eps, t)
    torch.testing.assert_close(predicted, eps, rtol=0, atol=1e-12)


def test_eps_of_a_standard_normal_is_sigma_times_x_at_every_level():
    prior = GaussianMixturePrior(torch.zeros(1, 4).double(), torch.ones(1).double(), torch.ones(1).double(), SCHEDULE)
    x_t, t = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(5)
    torch.testing.assert_close(prior.eps(x_t, t), SCHEDULE.alpha_sigma(t, x_t)[1] * x_t, rtol=1e-13, atol=0)


def test_far_from_every_mode_the_score_is_that_of_one_component():
    # 1e4 away every density underflows; the widest component wins there, and its score is (mu - x) / s^2.
    x = torch.tensor([[1e4, 0.0, 0.0]], dtype=torch.float64)
    score = mixture_score(x, MEANS[None], STD.square()[None], WEIGHTS)
    torch.testing.assert_close(score, MEANS[1:2] - x, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.1], [0.5, 0.3, 0.3]])
def test_weights_that_do_not_sum_to_one_are_refused(weights):
    with pytest.raises(ValueError, match="weights must sum to 1, got"):
        GaussianMixturePrior(MEANS, STD, torch.tensor(weights), SCHEDULE)


def test_samples_have_the_moments_of_the_mixture():
    drawn = GaussianMixturePrior(MEANS, STD, WEIGHTS, SCHEDULE).sample(40_000, torch.Generator().manual_seed(0))
    mean = WEIGHTS @ MEANS
    second = WEIGHTS @ (MEANS.square() + STD.square()[:, None])
    # Standard deviations of the coordinates are below 2.2, of their squares below 6: over sqrt(40,000) = 200, and four of them.
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.044)
    torch.testing.assert_close(drawn.square().mean(0), second, rtol=0, atol=0.12)
    again = GaussianMixturePrior(MEANS, STD, WEIGHTS, SCHEDULE).sample(40_000, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


def test_encode_and_decode_are_the_identity():
    prior, x = GaussianMixturePrior(MEANS, STD, WEIGHTS, SCHEDULE), torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(prior.encode(x), x)
    assert torch.equal(prior.decode(x), x)
