"""A particle in the prior's own space: a latent picture, which needs no encoding."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from dist_vsd.cameras import Cameras
from dist_vsd.particles.particle import Particle, Render


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """A latent picture as a particle."""

    channels: int = 4
    """Of the prior's latents."""
    resolution: int = 16
    """Height and width of the prior's latents (64 for Stable Diffusion at 512 pixels)."""
    initial_std: float = 1.0
    """Standard deviation of the noise that it starts from."""
    lr: float = 3e-2
    """Adam's learning rate."""

    def __post_init__(self) -> None:
        for name in ("channels", "resolution"):
            if getattr(self, name) < 1:
                raise ValueError(f"latent.{name} must be at least 1, got {getattr(self, name)}: raise --latent.{name}")
        if self.initial_std < 0:
            raise ValueError(f"latent.initial_std must be 0 or more, got {self.initial_std}: raise --latent.initial-std")


class LatentParticle(Particle):
    """x_0 itself as theta.

    Args:
        config: size and learning rate.
        generator: draws the start, on the CPU.
    """

    is_latent = True

    def __init__(self, config: LatentConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        shape = (1, config.channels, config.resolution, config.resolution)
        self.x_0 = nn.Parameter(config.initial_std * torch.randn(shape, generator=generator))

    def render(self, cameras: Cameras, size: int, generator: torch.Generator | None = None) -> Render:
        """Return x_0 once for each camera, of its own size."""
        x_0 = self.x_0.expand(len(cameras), -1, -1, -1)
        return Render(x_0, torch.ones_like(x_0[:, :1]), x_0, {})

    def become(self, picture: Tensor) -> None:
        """See Particle.become; takes (C, h, w) of x_0."""
        self.x_0.data.copy_(picture[None])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the one group, x_0."""
        return [{"params": [self.x_0], "lr": self.config.lr}]
