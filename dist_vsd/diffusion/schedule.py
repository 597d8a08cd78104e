"""The forward process x_t = alpha_t x_0 + sigma_t eps and what follows from it. Pure functions of tensors.

Notation as in ProlificDreamer (Wang et al. 2023, section 2) and progressive distillation (Salimans and Ho 2022, appendix D,
for v); alpha_t^2 + sigma_t^2 = 1 and diffusers' ``alphas_cumprod[t]`` is alpha_t^2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """A discrete variance-preserving noise schedule.

    Attributes:
        alphas_cumprod: (T,) alpha_t^2, falling from nearly 1; fp64, so that what is computed from it is as exact as what it multiplies.
        prediction_type: what the network predicts, one of PREDICTION_TYPES.
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            known = " or ".join(PREDICTION_TYPES)
            raise ValueError(f"prediction_type must be {known}, got {self.prediction_type!r}: use a prior that predicts one of them")

    @staticmethod
    def from_scheduler_config(config: Mapping[str, Any]) -> NoiseSchedule:
        """Read the schedule from any diffusers scheduler's configuration (its betas and its prediction type)."""
        scheduler = DDPMScheduler.from_config(dict(config))
        return NoiseSchedule(scheduler.alphas_cumprod.double(), scheduler.config.prediction_type)

    @property
    def num_timesteps(self) -> int:
        """T, the number of noise levels."""
        return self.alphas_cumprod.shape[0]

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t for (B,) integer timesteps, (B, 1, ..., 1) to multiply a (B, ...) tensor ``like``, of its dtype."""
        alpha_squared = self.alphas_cumprod[t].reshape(-1, *[1] * (like.ndim - 1))
        return alpha_squared.sqrt().to(like.dtype), (1.0 - alpha_squared).sqrt().to(like.dtype)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """Return the schedule on a device."""
        return NoiseSchedule(self.alphas_cumprod.to(device), self.prediction_type)

    def eps_from_prediction(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Turn a network's output, whatever it predicts, into eps (all (B, ...) alike; t (B,) integers)."""
        if self.prediction_type == "epsilon":
            return prediction
        alpha_t, sigma_t = self.alpha_sigma(t, x_t)
        return eps_from_v(prediction, x_t, alpha_t, sigma_t)


def add_noise(x_0: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t eps (ProlificDreamer, section 2)."""
    return alpha_t * x_0 + sigma_t * eps


def v_from_eps(eps: Tensor, x_0: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """V = alpha_t eps - sigma_t x_0 (Salimans and Ho 2022, appendix D)."""
    return alpha_t * eps - sigma_t * x_0


def eps_from_v(v: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Eps = alpha_t v + sigma_t x_t."""
    return alpha_t * v + sigma_t * x_t


def x_0_from_v(v: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """x_0 = alpha_t x_t - sigma_t v."""
    return alpha_t * x_t - sigma_t * v


def x_0_from_eps(eps: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """x_0 = (x_t - sigma_t eps) / alpha_t."""
    return (x_t - sigma_t * eps) / alpha_t


def eps_from_score(score: Tensor, sigma_t: Tensor) -> Tensor:
    """Eps = -sigma_t grad log p_t(x_t) (Song et al. 2021)."""
    return -sigma_t * score
