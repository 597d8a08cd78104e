"""ProlificDreamer's theorem 2 without any weights: with exact scores, VSD samples the prior, and SDS collapses on its modes.

The prior is a mixture of four Gaussians in the plane, g is the identity, and the particles are 512 points. score_gradient is the
product's own; only eps_phi is exchanged, for the exact score of the cloud or for a small network that learns it.
"""

import contextlib

import pytest
import torch
from torch import nn

from dist_vsd.diffusion.schedule import NoiseSchedule, add_noise, eps_from_score
from dist_vsd.diffusion.timesteps import TimestepConfig, draw_timesteps, max_fraction_at
from dist_vsd.objectives.vsd import phi_loss
from dist_vsd.priors.gaussian_mixture import GaussianMixturePrior, mixture_score
from dist_vsd.priors.prior import TextEmbeddings
from dist_vsd.training.update import score_gradient

NUM_PARTICLES, NUM_UPDATES = 512, 1500
SCHEDULE = NoiseSchedule.from_scheduler_config(
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
)
MEANS = torch.tensor([[2.0, 2.0], [-2.0, 2.0], [-2.0, -2.0], [2.0, -2.0]])
WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1])
STD = torch.full((4,), 0.35)
PRIOR = GaussianMixturePrior(MEANS, STD, WEIGHTS, SCHEDULE)
TIMESTEPS = TimestepConfig()
EMPTY = torch.zeros(NUM_PARTICLES, 1, 1)


class CloudScore:
    """The exact eps of the particles' noised distribution: a mixture with a point mass at each particle."""

    def __init__(self, theta):
        self.theta = theta

    def __call__(self, x_t, t, y, c2w):
        alpha_t, sigma_t = SCHEDULE.alpha_sigma(t, x_t)
        means = alpha_t[..., None] * self.theta.detach()[None]
        variances = sigma_t.square().expand(-1, len(self.theta))
        weights = torch.full((len(self.theta),), 1 / len(self.theta))
        return eps_from_score(mixture_score(x_t, means, variances, weights), sigma_t)

    def pretrained(self):
        return contextlib.nullcontext()


class LearnedScore(nn.Module):
    """A small network of x_t and t as eps_phi: an offset of the prior's eps that starts at zero, like LoRA."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x_t, t, y, c2w):
        _, sigma_t = SCHEDULE.alpha_sigma(t, x_t)
        inputs = [x_t, sigma_t, sigma_t**2, (6 * sigma_t).sin(), (6 * sigma_t).cos(), x_t * sigma_t]
        return PRIOR.eps(x_t, t) + self.net(torch.cat(inputs, -1))

    def pretrained(self):
        return contextlib.nullcontext()


def optimise(make_score, num_phi_steps=0):
    """Run 512 particles from a narrow start between the modes; return them."""
    generator = torch.Generator().manual_seed(0)
    theta = (0.5 * torch.randn(NUM_PARTICLES, 2, generator=generator)).requires_grad_()
    score = make_score(theta)
    adam = torch.optim.Adam([theta], lr=0.03, betas=(0.9, 0.99))
    phi_adam = torch.optim.AdamW(score.parameters(), lr=2e-3) if num_phi_steps else None
    for index in range(NUM_UPDATES):
        progress = index / NUM_UPDATES
        for group in adam.param_groups:
            group["lr"] = 0.03 * (1 - progress) + 1e-3
        high = max_fraction_at(TIMESTEPS, progress)
        t = draw_timesteps(torch.rand(NUM_PARTICLES, generator=generator), TIMESTEPS.min_fraction, high, 1000)
        eps = torch.randn(theta.shape, generator=generator)
        with torch.no_grad():
            theta.grad = score_gradient(
                PRIOR, score, theta.detach(), t, eps, TextEmbeddings(EMPTY, EMPTY), EMPTY, EMPTY, 1.0, "sigma_squared"
            )
        adam.step()
        for _ in range(num_phi_steps):
            t = draw_timesteps(torch.rand(NUM_PARTICLES, generator=generator), 0.0, 1.0, 1000)
            eps = torch.randn(theta.shape, generator=generator)
            x_t = add_noise(theta.detach(), eps, *SCHEDULE.alpha_sigma(t, eps))
            phi_adam.zero_grad()
            phi_loss(score(x_t, t, EMPTY, EMPTY), eps).mean().backward()
            phi_adam.step()
    return theta.detach()


def energy_distance(a, b):
    """2 E|A-B| - E|A-A'| - E|B-B'| (Szekely and Rizzo), zero for equal distributions."""
    within = [torch.cdist(s, s).sum() / (len(s) * (len(s) - 1)) for s in (a, b)]
    return float(2 * torch.cdist(a, b).mean() - within[0] - within[1])


def mode_weights(theta):
    nearest = torch.cdist(theta, MEANS).argmin(-1)
    return torch.bincount(nearest, minlength=4) / len(theta)


def in_mode_std(theta):
    nearest = torch.cdist(theta, MEANS).argmin(-1)
    return float((theta - MEANS[nearest]).square().mean().sqrt())


@pytest.fixture(scope="module")
def target():
    return PRIOR.sample(4096, torch.Generator().manual_seed(9))


def test_vsd_with_the_exact_score_samples_the_target(target):
    theta = optimise(CloudScore)
    # 512 fresh samples of the target are 0.0125 away by VSD.md; three standard errors of a mode's weight are 0.06.
    assert energy_distance(theta, target) < 0.02
    torch.testing.assert_close(mode_weights(theta), WEIGHTS, atol=0.06, rtol=0)
    assert in_mode_std(theta) == pytest.approx(0.35, abs=0.03)


def test_sds_collapses_onto_the_heavy_modes(target):
    theta = optimise(lambda theta: None)
    assert energy_distance(theta, target) > 0.3  # a hundred times that of fresh samples
    assert float(mode_weights(theta)[2:].max()) < 0.02  # the target's are 0.2 and 0.1
    assert in_mode_std(theta) < 0.25


def test_vsd_with_a_learned_score_comes_near(target):
    torch.manual_seed(0)
    theta = optimise(lambda theta: LearnedScore(), num_phi_steps=2)
    assert energy_distance(theta, target) < 0.03  # SDS: above 0.3
    assert in_mode_std(theta) == pytest.approx(0.35, abs=0.06)
