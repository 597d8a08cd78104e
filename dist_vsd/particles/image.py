"""The simplest particle: an RGB picture. It ignores the camera; text to image by score distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_vsd.cameras import Cameras
from dist_vsd.particles.particle import Particle, Render
from dist_vsd.particles.particle_configs import ImageConfig


class ImageParticle(Particle):
    """A picture held as logits, so that every value is a colour in (0, 1).

    Args:
        config: size and learning rate.
        generator: draws the start, grey with a little noise, on the CPU.
    """

    def __init__(self, config: ImageConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.logits = nn.Parameter(0.1 * torch.randn(1, 3, config.resolution, config.resolution, generator=generator))

    @classmethod
    def from_particle(cls, config: ImageConfig, other: Particle, generator: torch.Generator) -> ImageParticle:
        """See Particle.from_particle; a picture begins from a picture of any size, and from a coordinate network."""
        if not hasattr(other, "picture"):
            return super().from_particle(config, other, generator)
        started = cls(config, generator)
        with torch.no_grad():
            started.become(other.picture(config.resolution)[0])
        return started

    def picture(self, size: int) -> Tensor:
        """Return (1, 3, size, size), resized if it has another size; the gradient flows to theta."""
        image = self.logits.sigmoid()
        if size != self.config.resolution:
            image = nn.functional.interpolate(image, (size, size), mode="bilinear", antialias=True)
        return image

    def render(self, cameras: Cameras, size: int, drawn: Mapping[str, Tensor] | None = None) -> Render:
        """Return the picture, resized to ``size`` if it has another, once for each camera."""
        image = self.picture(size).expand(len(cameras), -1, -1, -1)
        return Render(image, torch.ones_like(image[:, :1]), image, {})

    def become(self, picture: Tensor) -> None:
        """See Particle.become; takes (3, H, W) in [0, 1], of which 0 and 1 themselves can only be neared."""
        resized = nn.functional.interpolate(picture[None], self.logits.shape[-2:], mode="bilinear", antialias=True)
        self.logits.data.copy_(resized.logit(eps=1e-3))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the one group, the pixels."""
        return [{"name": "pixels", "params": [self.logits], "lr": self.config.lr}]
