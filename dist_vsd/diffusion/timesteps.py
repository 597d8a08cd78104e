"""Draws of the diffusion time t, how their range anneals over a run, and the weight w(t) of each."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ANNEALINGS = ("stepped", "smooth", "descending", "none")
WEIGHTINGS = ("sigma_squared", "uniform", "alpha_sigma")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimestepConfig:
    """The range of t at each update of a particle, as fractions of the whole: of T, or of a rectified flow's time before its shift."""

    min_fraction: float = 0.02
    """Lowest t, as a fraction of T."""
    max_fraction: float = 0.98
    """Highest t before annealing."""
    late_max_fraction: float = 0.50
    """Highest t after annealing (ProlificDreamer, section 3.3: fine texture needs small t)."""
    annealing: str = "stepped"
    """stepped: the highest t jumps at anneal_at; smooth: it follows a cosine from the start to twice anneal_at
    (same mean for anneal_at up to 0.5, and no jump: the hard switch is known to make colours collapse); descending: t itself falls from the
    highest to the lowest over the run, as in sampling, each particle within jitter of it; none: it stays."""
    anneal_at: float = 0.3
    """Where the jump is, as a fraction of num_updates."""
    jitter: float = 0.05
    """Of descending t: how far above or below a particle's t may be, as a fraction of T."""
    weighting: str = "sigma_squared"
    """w(t): sigma_squared (both public implementations), uniform, or alpha_sigma."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_fraction < self.late_max_fraction <= self.max_fraction <= 1.0:
            raise ValueError(
                "timesteps must satisfy 0 <= min_fraction < late_max_fraction <= max_fraction <= 1, got "
                f"{self.min_fraction}, {self.late_max_fraction}, {self.max_fraction}: change --timesteps.*"
            )
        if not 0.0 <= self.anneal_at <= 1.0:
            raise ValueError(f"timesteps.anneal_at must be in [0, 1], got {self.anneal_at}: change --timesteps.anneal-at")
        if not 0.0 <= self.jitter <= 1.0:
            raise ValueError(f"timesteps.jitter must be in [0, 1], got {self.jitter}: change --timesteps.jitter")
        _require_one_of("timesteps.annealing", self.annealing, ANNEALINGS)
        _require_one_of("timesteps.weighting", self.weighting, WEIGHTINGS)


def _require_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def range_at(config: TimestepConfig, progress: float) -> tuple[float, float]:
    """Return the lowest and the highest t, as fractions of T, at a progress in [0, 1) through the run."""
    low, high = config.min_fraction, config.max_fraction
    if config.annealing == "descending":
        middle = high + (low - high) * progress
        return max(low, middle - config.jitter), min(high, middle + config.jitter)
    return low, _highest_at(config, progress)


def _highest_at(config: TimestepConfig, progress: float) -> float:
    if config.annealing == "none":
        return config.max_fraction
    if config.annealing == "stepped":
        return config.max_fraction if progress < config.anneal_at else config.late_max_fraction
    done = min(1.0, progress / max(2 * config.anneal_at, 1e-9))
    remaining = 0.5 * (1.0 + math.cos(math.pi * done))
    return config.late_max_fraction + (config.max_fraction - config.late_max_fraction) * remaining


def draw_timesteps(uniform: Tensor, low_fraction: float, high_fraction: float, num_timesteps: int) -> Tensor:
    """Map uniform numbers to integer timesteps, each of [low T, high T] equally likely.

    Args:
        uniform: (B,) in [0, 1).
        low_fraction, high_fraction: the range as fractions of T; both ends are included (but T itself).
        num_timesteps: T.

    Returns:
        (B,) int64 in [0, T-1].
    """
    low, high = round(low_fraction * num_timesteps), min(round(high_fraction * num_timesteps), num_timesteps - 1)
    return low + (uniform * (high - low + 1)).floor().long().clamp(max=high - low)  # rounding may reach the count itself


def timestep_weight(weighting: str, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Return w(t), shaped like alpha_t: sigma_t^2 (DreamFusion, ProlificDreamer), 1, or alpha_t sigma_t."""
    if weighting == "sigma_squared":
        return sigma_t.square()
    if weighting == "alpha_sigma":
        return alpha_t * sigma_t
    return alpha_t.new_ones(alpha_t.shape)
