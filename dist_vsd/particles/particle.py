"""What every particle can do, whatever it is made of."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from dist_vsd.cameras import Cameras


@dataclasses.dataclass(frozen=True)
class Render:
    """What a particle shows to B cameras.

    Attributes:
        image: (B, 3, H, W) composited on the background; in [0, 1], or a few percent beyond where a field pads its colours.
        opacity: (B, 1, H, W) in [0, 1]; ones for a particle without depth.
        regularizers: named scalars that the objective may weigh and add, differentiable in theta.
    """

    image: Tensor
    opacity: Tensor
    regularizers: dict[str, Tensor]


class Particle(nn.Module):
    """theta^(i) with its differentiable image parameterisation g(theta, c).

    A particle is never wrapped in DistributedDataParallel: particles on different ranks are different objects.
    """

    def render(self, cameras: Cameras, size: int, generator: torch.Generator | None = None) -> Render:
        """Render g(theta, c); the gradient flows to theta.

        Args:
            cameras: B cameras on the particle's device.
            size: height and width in pixels.
            generator: of the random sample positions and the background, on the CPU; None renders without randomness.
        """
        raise TypeError(f"{type(self).__name__} does not render")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return Adam's parameter groups, each with its own ``lr``."""
        raise TypeError(f"{type(self).__name__} has no parameters")

    def after_update(self, update: int, generator: torch.Generator) -> None:
        """Refresh what the particle keeps beside its parameters (an occupancy grid); called after each Adam step."""
