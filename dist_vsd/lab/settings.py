"""What the laboratory is asked: the settings that all runs of a comparison share, and what it compares."""

from __future__ import annotations

import dataclasses
import math

from dist_vsd.diffusion.timesteps import TimestepConfig

METHODS = ("denoising", "sds", "vsd")
PHIS = ("exact", "learned")
ORDERS = ("theta_then_phi", "phi_then_theta")
PROCESSES = ("variance_preserving", "rectified_flow")
MEASURES = ("energy_distance", "mode_weights", "in_mode_std", "kl", "kl_noised", "phi_gap")  # measures.py defines them
NUM_NEIGHBOURS = 5  # that the entropy in kl looks at
MOST_LR = 1000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of a comparison share."""

    num_particles: int = 512
    """Points of each run."""
    num_updates: int = 1500
    """Updates of every particle."""
    start_std: float = 0.5
    """Standard deviation of the start, around the origin."""
    lr: float = 0.03
    """Of theta's Adam (0.9, 0.99), at the start."""
    final_lr_fraction: float = 0.03
    """Its share that is left at the end; it falls linearly."""
    phi_lr: float = 2e-3
    """Of phi's AdamW, constant."""
    guidance_scale: float = 1.0
    """Classifier-free guidance s; a mixture has no unconditional branch, which leaves 1."""
    process: str = PROCESSES[0]
    """variance_preserving (Stable Diffusion's schedule, eps) or rectified_flow (x_t = (1 - s) x_0 + s eps, the velocity)."""
    shift: float = 3.0
    """Of a rectified flow: above 1 more of the time is spent at high noise; Stable Diffusion 3 has 3."""
    timesteps: TimestepConfig = TimestepConfig()
    """Of t and w(t)."""

    def __post_init__(self) -> None:
        if self.process not in PROCESSES:
            raise ValueError(f"process must be one of {', '.join(PROCESSES)}, got {self.process[:60]!r}: change --process")
        if not 0.0 < self.shift < math.inf:
            raise ValueError(f"shift must be a positive number, got {self.shift}: change --shift (1 for none)")
        for name in ("num_particles", "num_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}: raise --{name.replace('_', '-')}")
        for name, most in (("start_std", math.inf), ("lr", MOST_LR), ("phi_lr", MOST_LR)):
            value = getattr(self, name)
            if not 0.0 < value <= most or math.isinf(value):
                raise ValueError(f"{name} must be above 0 and at most {most:g}, got {value}: change --{name.replace('_', '-')}")
        if not 0.0 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale must be a number from 0 on, got {self.guidance_scale}: change --guidance-scale")
        if not 0.0 <= self.final_lr_fraction <= 1.0:
            raise ValueError(f"final_lr_fraction must be in [0, 1], got {self.final_lr_fraction}: change --final-lr-fraction")


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a comparison compares.

    Attributes:
        method: one of METHODS.
        phi: one of PHIS for vsd; empty for the others, which have none.
        phi_steps: of a learned phi an update; else 0.
        order: of a learned phi, one of ORDERS. theta_then_phi is Algorithm 1: phi learns the renders that theta's step has just used, so
            theta's next step meets a phi that is one update behind. phi_then_theta: phi first learns where the particles are (the
            lookahead of L2-VSD, Lei et al. 2025, arXiv 2507.09748, which they then linearise). An exact phi is where the particles are.
    """

    method: str
    phi: str = ""
    phi_steps: int = 0
    order: str = ""

    @property
    def name(self) -> str:
        """A name for files."""
        return "-".join(filter(None, [self.method, self.phi, str(self.phi_steps or ""), self.order]))

    @property
    def label(self) -> str:
        """A name for people."""
        if self.phi != "learned":
            return {"denoising": "denoising", "sds": "SDS", "vsd": "VSD, exact phi"}[self.method]
        steps = f"{self.phi_steps} phi step{'s' if self.phi_steps > 1 else ''}"
        return f"VSD, {steps}" + (", phi first" if self.order == "phi_then_theta" else "")


def check_measures(measures: tuple[str, ...], num_particles: int) -> None:
    """Refuse measures that don't exist, or can't be taken of so few particles.

    Raises:
        ValueError: with one line.
    """
    for measure in measures:
        if measure not in MEASURES:
            raise ValueError(f"measure {measure[:60]!r} does not exist: use some of {', '.join(MEASURES)}")
    if "kl" in measures and num_particles <= NUM_NEIGHBOURS:
        raise ValueError(
            f"the measure kl needs at least {NUM_NEIGHBOURS + 1} particles (it asks for the {NUM_NEIGHBOURS}th nearest neighbour), "
            f"got {num_particles}: raise --num-particles, or leave kl out of --measures"
        )
