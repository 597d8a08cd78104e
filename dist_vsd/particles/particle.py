"""What every particle can do, whatever it is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dist_vsd.cameras import Cameras


@dataclasses.dataclass(frozen=True)
class Render:
    """What a particle shows to B cameras.

    Attributes:
        image: (B, 3, H, W) composited on the background; in [0, 1], or a few percent beyond where a field pads its colours. Of a
            latent particle: (B, C, h, w), x_0 itself.
        opacity: (B, 1, H, W) in [0, 1]; ones for a particle without depth.
        foreground: like image, premultiplied by opacity and without a background.
        regularizers: named scalars that may be weighed and added to the objective, differentiable in theta; computed when called.
    """

    image: Tensor
    opacity: Tensor
    foreground: Tensor
    regularizers: dict[str, Callable[[], Tensor]]


class Particle(nn.Module):
    """theta^(i) with its differentiable image parameterisation g(theta, c).

    A particle is never wrapped in DistributedDataParallel: particles on different ranks are different objects.

    Attributes:
        is_latent: it renders x_0 itself, which the prior decodes for whoever wants to look.
    """

    is_latent = False

    def render(self, cameras: Cameras, size: int, generator: torch.Generator | None = None) -> Render:
        """Render g(theta, c); the gradient flows to theta.

        Args:
            cameras: B cameras on the particle's device.
            size: height and width in pixels.
            generator: of the random sample positions and the background, on the CPU; None renders without randomness.
        """
        raise TypeError(f"{type(self).__name__} does not render")

    def become(self, picture: Tensor) -> None:
        """Show a picture, or x_0 for a latent particle, as it is; what is sampled from the prior is put in by this.

        Args:
            picture: (C, H, W).
        """
        raise TypeError(f"{type(self).__name__} can't be set to a picture")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return Adam's parameter groups, each with its own ``lr``."""
        raise TypeError(f"{type(self).__name__} has no parameters")

    def after_update(self, update: int, generator: torch.Generator) -> None:
        """Refresh what the particle keeps beside its parameters (an occupancy grid); called after each Adam step."""
