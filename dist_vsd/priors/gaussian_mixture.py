"""A mixture of Gaussians as a prior: its noised densities, and so its scores, are known exactly. For tests of the theory.

If x_0 ~ sum_k w_k N(mu_k, s_k^2 I), then x_t ~ sum_k w_k N(alpha_t mu_k, (alpha_t^2 s_k^2 + sigma_t^2) I).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vsd.diffusion.schedule import NoiseSchedule, eps_from_score


def mixture_score(x_t: Tensor, means: Tensor, variances: Tensor, weights: Tensor) -> Tensor:
    """Return grad log p of a mixture of isotropic Gaussians.

    Args:
        x_t: (B, D) points.
        means: (B or 1, K, D).
        variances: (B or 1, K), of each coordinate.
        weights: (K,), summing to 1.

    Returns:
        (B, D).
    """
    difference = means - x_t[:, None]
    log_density = -0.5 * difference.square().sum(-1) / variances - 0.5 * x_t.shape[-1] * variances.log()
    responsibility = torch.softmax(weights.log() + log_density, -1)
    return (responsibility[..., None] * difference / variances[..., None]).sum(1)


class GaussianMixturePrior:
    """A prior in D dimensions with exact scores; text is ignored and encode is the identity.

    Args:
        means: (K, D).
        std: (K,) standard deviation of each component.
        weights: (K,), summing to 1.
        schedule: the noise schedule.
    """

    image_size = 0

    def __init__(self, means: Tensor, std: Tensor, weights: Tensor, schedule: NoiseSchedule) -> None:
        if not torch.isclose(weights.sum(), weights.new_tensor(1.0), atol=1e-5):
            raise ValueError(f"a mixture's weights must sum to 1, got {weights.tolist()}")
        self.means, self.std, self.weights, self.schedule = means, std, weights, schedule

    def encode(self, image: Tensor) -> Tensor:
        """Return the samples themselves."""
        return image

    def decode(self, x_0: Tensor) -> Tensor:
        """Return the samples themselves."""
        return x_0

    def eps(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the exact eps = -sigma_t grad log p_t(x_t) for (B, D) points at (B,) timesteps."""
        alpha_t, sigma_t = self.schedule.alpha_sigma(t, x_t)
        variances = (alpha_t * self.std).square() + sigma_t.square()
        score = mixture_score(x_t, alpha_t[..., None] * self.means, variances, self.weights)
        return eps_from_score(score, sigma_t)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw (count, D) samples of p_0."""
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + self.std[k, None] * noise
