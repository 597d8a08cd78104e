"""How far a cloud of particles is from its target.

- energy_distance: 2 E|X - Y| - E|X - X'| - E|Y - Y'| between the particles X, taken as the whole of their distribution (a particle's
  distance to itself counts), and the target Y (Szekely and Rizzo 2013). It is 0 only for the target itself. n fresh samples of the target
  have E|Y - Y'| / n on average, which is what n points placed at random cost.
- mode_weights: the share of particles in each mode; a particle belongs to the component that most likely made it.
  mode_weight_error: half the sum of their absolute differences from the target's (total variation).
- in_mode_std: root mean square distance of a particle from its mode's mean, by coordinate.
- kl: KL(q || p) = -H(q) - E_q log p, with the exact log p and the entropy by Kozachenko and Leonenko's estimator over the 5th nearest
  neighbour (Kraskov, Stoegbauer and Grassberger 2004, equation 20). It takes particles for independent draws: those that repel each
  other, as VSD's do, can come out slightly below 0. Infinite (null in JSON) where particles coincide.
  In many dimensions the estimate is far off; fresh samples of the target show by how much.
- kl_noised: KL(q_t || p_t) at t = 0.2 T (of a rectified flow, a fraction of 0.2 before its shift), one level of VSD's own objective
  (ProlificDreamer, theorem 1): both densities are known exactly, the mean over q_t is over 8 draws of each particle.
- phi_gap: mean |eps_phi - eps_exact|^2 over coordinates at noised particles, t over the whole range that the particles use: how far a
  learned phi is from what it learns. mean_phi_gap is its mean over a run, without the start, where phi is the prior.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dist_vsd.diffusion.process import add_noise
from dist_vsd.lab.scores import CloudScore, ExactScore, LearnedScore, cloud_logits
from dist_vsd.lab.settings import NUM_NEIGHBOURS
from dist_vsd.priors.gaussian_mixture import GaussianMixturePrior

NUM_TARGET_SAMPLES = 8192
TARGET_SEED, MEASURE_SEED = 9, 10  # the same for all runs, so that they differ by their particles alone
KL_FRACTION, KL_REPEATS = 0.2, 8
GAP_FRACTIONS = (0.02, 0.98)
CHUNK = 1024  # rows of a matrix of distances at once


def mean_distance(a: Tensor, b: Tensor) -> float:
    """Return E|A - B| over all pairs of (n, D) and (m, D) points."""
    total = sum(float(torch.cdist(rows, b).sum(dtype=torch.float64)) for rows in a.split(CHUNK))
    return total / (len(a) * len(b))


def entropy(x: Tensor) -> float:
    """Return the differential entropy, in nats, of the distribution that (n, D) points were drawn from; -inf if points coincide."""
    n, num_dimensions = x.shape
    radius = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(NUM_NEIGHBOURS + 1, -1).values  # the first is itself
    log_ball = 0.5 * num_dimensions * math.log(math.pi) - math.lgamma(0.5 * num_dimensions + 1)
    counts = torch.digamma(torch.tensor([n, NUM_NEIGHBOURS], dtype=torch.float64))
    return float(counts[0] - counts[1] + log_ball + num_dimensions * radius.double().log().mean())


class Target:
    """A mixture as what particles are measured against.

    Args:
        prior: the mixture.
    """

    def __init__(self, prior: GaussianMixturePrior) -> None:
        self.prior = prior
        self.samples = prior.sample(NUM_TARGET_SAMPLES, torch.Generator().manual_seed(TARGET_SEED))
        # Without each sample's distance to itself: the target is continuous, its samples only stand for it.
        self.distance_within = mean_distance(self.samples, self.samples) * NUM_TARGET_SAMPLES / (NUM_TARGET_SAMPLES - 1)

    def measure(self, theta: Tensor, measures: tuple[str, ...], phi: CloudScore | None = None) -> dict[str, float | list[float] | None]:
        """Return figures of (n, D) particles.

        Args:
            theta: the particles.
            measures: some of MEASURES; phi_gap is left out where phi is not learned.
            phi: eps_phi.
        """
        figures: dict[str, float | list[float] | None] = {}
        if "energy_distance" in measures:
            figures["energy_distance"] = self.energy_distance(theta)
        if "mode_weights" in measures:
            weights = self.mode_weights(theta)
            figures["mode_weights"] = weights.tolist()
            figures["mode_weight_error"] = 0.5 * float((weights - self.prior.weights).abs().sum())
        if "in_mode_std" in measures:
            figures["in_mode_std"] = self.in_mode_std(theta)
        if "kl" in measures:
            divergence = self.kl(theta)
            figures["kl"] = divergence if math.isfinite(divergence) else None
        if "kl_noised" in measures:
            figures["kl_noised"] = self.kl_noised(theta)
        if "phi_gap" in measures and isinstance(phi, LearnedScore):
            figures["phi_gap"] = self.phi_gap(theta, phi)
        return figures

    def energy_distance(self, theta: Tensor) -> float:
        """Return the particles' energy distance to the target."""
        return 2 * mean_distance(theta, self.samples) - mean_distance(theta, theta) - self.distance_within

    def mode_weights(self, theta: Tensor) -> Tensor:
        """Return (K,) shares of the particles."""
        modes = self.prior.component_log_densities(theta).argmax(-1)
        return torch.bincount(modes, minlength=len(self.prior.weights)) / len(theta)

    def in_mode_std(self, theta: Tensor) -> float:
        """Return the root mean square distance of a particle from its mode's mean, by coordinate."""
        modes = self.prior.component_log_densities(theta).argmax(-1)
        return float((theta - self.prior.means[modes]).square().mean().sqrt())

    def kl(self, theta: Tensor) -> float:
        """Return KL(q || p), in nats, by nearest neighbours."""
        return -entropy(theta) - float(self.prior.log_density(theta).double().mean())

    def kl_noised(self, theta: Tensor) -> float:
        """Return KL(q_t || p_t), in nats, at a fraction of KL_FRACTION of the time."""
        n, num_dimensions = theta.shape
        generator = torch.Generator().manual_seed(MEASURE_SEED)
        x_0 = theta.repeat(KL_REPEATS, 1)
        t = self.prior.process.draw_t(torch.zeros(len(x_0)), KL_FRACTION, KL_FRACTION)
        alpha_t, sigma_t = self.prior.process.alpha_sigma(t, x_0)
        x_t = add_noise(x_0, torch.randn(x_0.shape, generator=generator), alpha_t, sigma_t)
        log_normaliser = math.log(n) + num_dimensions * (0.5 * math.log(2 * math.pi) + math.log(float(sigma_t[0])))
        log_q_t = cloud_logits(x_t, theta, alpha_t, sigma_t).logsumexp(-1) - log_normaliser
        return float((log_q_t - self.prior.log_density(x_t, t)).double().mean())

    @torch.no_grad()
    def phi_gap(self, theta: Tensor, phi: CloudScore) -> float:
        """Return the mean squared difference of eps_phi from the exact eps of the particles."""
        generator = torch.Generator().manual_seed(MEASURE_SEED)
        process = self.prior.process
        t = process.draw_t(torch.rand(len(theta), generator=generator), *GAP_FRACTIONS)
        x_t = add_noise(theta, torch.randn(theta.shape, generator=generator), *process.alpha_sigma(t, theta))
        exact = ExactScore(process)
        exact.follow(theta, 0)
        return float((phi(x_t, t) - exact(x_t, t)).square().mean())
