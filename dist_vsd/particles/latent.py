"""A particle in the prior's own space: a latent picture, which needs no encoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_vsd.cameras import Cameras
from dist_vsd.particles.particle import Particle, Render
from dist_vsd.particles.particle_configs import LatentConfig


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

    def render(self, cameras: Cameras, size: int, drawn: Mapping[str, Tensor] | None = None) -> Render:
        """Return x_0 once for each camera, of its own size."""
        x_0 = self.x_0.expand(len(cameras), -1, -1, -1)
        return Render(x_0, torch.ones_like(x_0[:, :1]), x_0, {})

    def become(self, picture: Tensor) -> None:
        """See Particle.become; takes (C, h, w) of x_0."""
        self.x_0.data.copy_(picture[None])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the one group, x_0."""
        return [{"name": "latent", "params": [self.x_0], "lr": self.config.lr}]
