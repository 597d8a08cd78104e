"""The colour that a field shows where a surface has been put into it: what light brings from the depth that is seen there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dist_vsd.particles.radiance_field import RadianceField

# Samples before the surface and behind it, and how far apart, as a share of the length 1 / level in which light falls to 1/e.
NUM_BEFORE, NUM_BEHIND, STEP = 6, 10, 0.1
LONGEST_STEP = 1 / 32  # of half the cube's side: what is fainter is not a surface's
FAINT = 1e-6  # of each sample's weight: off the surface, where a coarse mesh may lie, there is nothing to see, and they are averaged


def seen_colors(field: RadianceField, volume: Tensor, threshold: float) -> Callable[[Tensor], Tensor]:
    """Return the function from (N, 3) points of the surface of a level, in scene units, to (N, 3) colours seen there from outside.

    A field is no surface: a pixel's colour comes from all depths that light reaches. So a short way from outside to inside, down the
    density's gradient, is composited as a ray is rendered, without what lies behind it. Before the surface the density counts as far as it
    falls outwards; beyond begin other parts of the object.

    Args:
        field: the particle.
        volume: its ``density_volume``, whose gradient says where inside is.
        threshold: the level, 1 / scene units.
    """
    bound, center = field.config.bound, field.center
    cell, step = 2 * bound / len(volume), min(STEP / threshold, LONGEST_STEP * bound)
    places = (torch.arange(-NUM_BEFORE, NUM_BEHIND, device=volume.device) + 0.5) * step
    axes = cell * torch.eye(3, device=volume.device)

    def colors(points: Tensor) -> Tensor:
        middle = points.to(center) + center
        ahead, back = ([_interpolate(volume, (middle + sign * axis) / bound) for axis in axes] for sign in (1, -1))
        rise = torch.stack(ahead, 1) - torch.stack(back, 1)
        inwards = torch.nn.functional.normalize(rise, dim=1)
        densities, colors = field((middle[:, None] + inwards[:, None] * places[:, None]).reshape(-1, 3))
        densities, colors = densities.reshape(len(points), -1), colors.reshape(len(points), -1, 3)
        falling = densities[:, :NUM_BEFORE].flip(1).cummin(1).values.flip(1)
        thickness = torch.cat([falling, densities[:, NUM_BEFORE:]], 1) * step
        weights = -torch.expm1(-thickness) * torch.exp(thickness - thickness.cumsum(1)) + FAINT
        return (weights[..., None] * colors).sum(1) / weights.sum(1, keepdim=True)

    return colors


def _interpolate(volume: Tensor, places: Tensor) -> Tensor:
    """Return the (N,) values of a volume, whose cells' centres hold them, at (N, 3) places in [-1, 1]^3."""
    return torch.nn.functional.grid_sample(volume[None, None], places[None, None, None].flip(-1), align_corners=False)[0, 0, 0, 0]
