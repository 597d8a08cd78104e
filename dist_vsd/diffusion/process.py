"""The forward process x_t = alpha_t x_0 + sigma_t eps, in two kinds, and what follows from it.

A process maps t to alpha_t and sigma_t, and what a network predicts (eps, v, a velocity) to eps. Whoever noises, asks or trains a
network does it through the process and never asks which it is. The formulas below the classes are pure functions of tensors.

Notation as in ProlificDreamer (Wang et al. 2023, section 2), progressive distillation (Salimans and Ho 2022, appendix D, for v), and
Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206) for the rectified flow, whose time is s here, the share of noise in x_t.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from dist_vsd.diffusion.timesteps import draw_timesteps

PREDICTION_TYPES = ("epsilon", "v_prediction")
# The loss on v divides an error of eps by alpha_t, but by no less than this, so that no t weighs more than 100 times as much as one
# without noise. It acts above 0.93 T of Stable Diffusion's schedule, which ends at alpha_t = 0.068 (a weight of 215), and keeps one of zero
# terminal SNR finite. Rounding of eps in bf16, 2^-9, stays below 2% of v, and in fp16 an error of eps of 25 can be squared.
LEAST_ALPHA = 0.1
# Of a rectified flow: the lowest share of noise that is drawn, the last of the 1,000 that diffusers' schedulers train on.
LEAST_FRACTION = 1e-3


class Process(Protocol):
    """What noises x_0, and how a network that undoes it is read.

    Attributes:
        samplers: of priors/sampling.py that follow this process: the default first, the one for few steps last.
    """

    samplers: ClassVar[tuple[str, ...]]

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t for (B,) times, (B, 1, ..., 1) to multiply a (B, ...) tensor ``like``, of its dtype."""
        ...

    def draw_t(self, uniform: Tensor, low_fraction: float, high_fraction: float) -> Tensor:
        """Map (B,) uniform numbers in [0, 1) to (B,) times between two fractions of the whole range."""
        ...

    def fraction(self, t: Tensor) -> Tensor:
        """Return how noisy (B,) times are, from 0 to 1."""
        ...

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return what the network should predict of (B, ...) x_0 noised with eps; linear in both, so expectations pass through."""
        ...

    def eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Turn a network's output, whatever it predicts, into eps (all (B, ...) alike; t (B,)); the gradient flows to both."""
        ...

    def error(self, prediction: Tensor, x_0: Tensor, x_t: Tensor, eps: Tensor, t: Tensor, loss: str) -> Tensor:
        """Return what phi's regression squares.

        Args:
            prediction: (B, ...) a network's output at x_t.
            x_0, x_t, eps: like it: what was noised, the result, and the noise.
            t: (B,) times.
            loss: eps: eps_phi - eps; v: v_phi - v; empty: the one of the two that networks of this process are trained with.

        Returns:
            Like x_0; the gradient flows to the prediction.
        """
        ...

    def to(self, device: torch.device | str) -> Process:
        """Return the process on a device."""
        ...


@dataclasses.dataclass(frozen=True)
class VariancePreserving:
    """A discrete process with alpha_t^2 + sigma_t^2 = 1, t = 0 ... T-1, whose network predicts eps or v.

    Attributes:
        alphas_cumprod: (T,) alpha_t^2, falling from nearly 1; fp64, so that what is computed from it is as exact as what it multiplies.
        prediction_type: what the network predicts, one of PREDICTION_TYPES.
    """

    samplers: ClassVar[tuple[str, ...]] = ("ddim", "dpmsolver++")
    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            known = " or ".join(PREDICTION_TYPES)
            raise ValueError(f"prediction_type must be {known}, got {self.prediction_type!r}: use a prior that predicts one of them")

    @staticmethod
    def from_scheduler_config(config: Mapping[str, Any]) -> VariancePreserving:
        """Read the process from any diffusers scheduler's configuration (its betas and its prediction type)."""
        scheduler = DDPMScheduler.from_config(dict(config))
        return VariancePreserving(scheduler.alphas_cumprod.double(), scheduler.config.prediction_type)

    @property
    def num_timesteps(self) -> int:
        """T, the number of noise levels."""
        return self.alphas_cumprod.shape[0]

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """See Process; t are integers."""
        alpha_squared = self.alphas_cumprod[t].reshape(-1, *[1] * (like.ndim - 1))
        return alpha_squared.sqrt().to(like.dtype), (1.0 - alpha_squared).sqrt().to(like.dtype)

    def draw_t(self, uniform: Tensor, low_fraction: float, high_fraction: float) -> Tensor:
        """See Process; int64, each of [low T, high T] equally likely."""
        return draw_timesteps(uniform, low_fraction, high_fraction, self.num_timesteps)

    def fraction(self, t: Tensor) -> Tensor:
        """Return t / T."""
        return t / self.num_timesteps

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """See Process."""
        return eps if self.prediction_type == "epsilon" else v_from_eps(eps, x_0, *self.alpha_sigma(t, eps))

    def eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """See Process; a prediction of eps is returned as it is."""
        return prediction if self.prediction_type == "epsilon" else eps_from_v(prediction, x_t, *self.alpha_sigma(t, x_t))

    def error(self, prediction: Tensor, x_0: Tensor, x_t: Tensor, eps: Tensor, t: Tensor, loss: str) -> Tensor:
        """See Process; the default is eps.

        At the same x_t the error of v is that of eps / alpha_t. A network that predicts v has it without the division; for one that
        predicts eps, alpha_t is bounded from below by LEAST_ALPHA.
        """
        if (loss or "eps") == "eps":
            return self.eps(prediction, x_t, t) - eps
        if self.prediction_type == "v_prediction":
            return prediction - self.target(x_0, eps, t)
        alpha_t, _ = self.alpha_sigma(t, eps)
        return (prediction - eps) / alpha_t.clamp_min(LEAST_ALPHA)

    def to(self, device: torch.device | str) -> VariancePreserving:
        """Return the process on a device."""
        return VariancePreserving(self.alphas_cumprod.to(device), self.prediction_type)


@dataclasses.dataclass(frozen=True)
class RectifiedFlow:
    """A straight line from x_0 to noise, alpha_t = 1 - s and sigma_t = s with t = s in (0, 1], whose network predicts the velocity.

    Attributes:
        shift: k of s = k u / (1 + (k - 1) u): how much of the time is spent at high noise. 1: none; Stable Diffusion 3 has 3.

    Raises:
        ValueError: the shift is not positive.
    """

    samplers: ClassVar[tuple[str, ...]] = ("euler",)
    shift: float = 3.0

    def __post_init__(self) -> None:
        if not 0.0 < self.shift < math.inf:
            raise ValueError(f"a rectified flow's shift must be a positive number, got {self.shift}: use 1 for none, or 3 as SD3 does")

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """See Process."""
        s = t.double().reshape(-1, *[1] * (like.ndim - 1))
        return (1.0 - s).to(like.dtype), s.to(like.dtype)

    def draw_t(self, uniform: Tensor, low_fraction: float, high_fraction: float) -> Tensor:
        """See Process; the fractions are of u, before the shift, and at least LEAST_FRACTION; of the uniform numbers' dtype."""
        u = low_fraction + (high_fraction - low_fraction) * uniform
        return shifted(u.clamp_min(LEAST_FRACTION), self.shift)

    def fraction(self, t: Tensor) -> Tensor:
        """Return s."""
        return t

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """See Process."""
        return velocity(eps, x_0)

    def eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """See Process; Delta eps = (1 - s) Delta v, so that at s = 1, where x_t is noise alone, eps is x_t."""
        return eps_from_velocity(prediction, x_t, self.alpha_sigma(t, x_t)[1])

    def error(self, prediction: Tensor, x_0: Tensor, x_t: Tensor, eps: Tensor, t: Tensor, loss: str) -> Tensor:
        """See Process; the default is v, the velocity."""
        if (loss or "v") == "v":
            return prediction - self.target(x_0, eps, t)
        return self.eps(prediction, x_t, t) - eps

    def to(self, device: torch.device | str) -> RectifiedFlow:
        """Return the process itself: it holds no tensors."""
        return self


def add_noise(x_0: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t eps (ProlificDreamer, section 2)."""
    return alpha_t * x_0 + sigma_t * eps


def v_from_eps(eps: Tensor, x_0: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """V = alpha_t eps - sigma_t x_0 (Salimans and Ho 2022, appendix D)."""
    return alpha_t * eps - sigma_t * x_0


def eps_from_v(v: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Eps = alpha_t v + sigma_t x_t, where alpha_t^2 + sigma_t^2 = 1 (Salimans and Ho 2022, appendix D)."""
    return alpha_t * v + sigma_t * x_t


def x_0_from_v(v: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """x_0 = alpha_t x_t - sigma_t v, where alpha_t^2 + sigma_t^2 = 1 (Salimans and Ho 2022, appendix D)."""
    return alpha_t * x_t - sigma_t * v


def x_0_from_eps(eps: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """x_0 = (x_t - sigma_t eps) / alpha_t (ProlificDreamer, section 2)."""
    return (x_t - sigma_t * eps) / alpha_t


def eps_from_score(score: Tensor, sigma_t: Tensor) -> Tensor:
    """Eps = -sigma_t grad log p_t(x_t) (Song et al. 2021)."""
    return -sigma_t * score


def velocity(eps: Tensor, x_0: Tensor) -> Tensor:
    """V = dx_s/ds = eps - x_0 of x_s = (1 - s) x_0 + s eps (Liu et al. 2022, arXiv 2209.03003, equation 1, whose time runs from noise)."""
    return eps - x_0


def eps_from_velocity(v: Tensor, x_t: Tensor, s: Tensor) -> Tensor:
    """Eps = x_t + (1 - s) v: the line followed to its end (Esser et al. 2024, equation 13)."""
    return x_t + (1.0 - s) * v


def x_0_from_velocity(v: Tensor, x_t: Tensor, s: Tensor) -> Tensor:
    """x_0 = x_t - s v: the line followed to its start (Esser et al. 2024, equation 13)."""
    return x_t - s * v


def shifted(u: Tensor, shift: float) -> Tensor:
    """S = k u / (1 + (k - 1) u), from [0, 1] onto itself (Esser et al. 2024, equation 23, with k = sqrt(m / n))."""
    return shift * u / (1.0 + (shift - 1.0) * u)
