"""The picture that a browser shows: one particle, or several next to each other seen from the same camera."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.particles.channels import picture_of
from dist_vsd.viewing.browser_camera import even_size, square_around
from dist_vsd.viewing.shelf import Shown

MOST_COLUMNS = 8


def grid_of(count: int) -> tuple[int, int]:
    """Return rows and columns for a number of particles: one row as long as it lasts."""
    rows = math.ceil(count / MOST_COLUMNS)
    return rows, math.ceil(count / rows)


def panel_size(count: int, height: int, aspect: float) -> tuple[int, int]:
    """Return height and width, pixels, of each of ``count`` particles in a picture of a height and an aspect (width / height)."""
    rows, columns = grid_of(count)
    return even_size(height / rows, aspect * rows / columns)


@torch.no_grad()
def render_panel(shown: Shown, camera: Cameras, height: int, width: int, channel: str) -> Tensor:
    """Render one particle as (3, height, width) in [0, 1] on the CPU; a 2D particle is the same from everywhere, on white.

    Args:
        shown: the particle.
        camera: one, with the field of view of the shorter side.
        height, width: even numbers.
        channel: that its representation shows.
    """
    if shown.row.is_flat:
        return _flat(shown, camera, height, width)
    square, size = square_around(camera.to(next(shown.theta.parameters()).device), height, width)
    image = picture_of(shown.theta.render(square, size), channel, square)[0]
    top, left = (size - height) // 2, (size - width) // 2
    return image[:, top : top + height, left : left + width].cpu().clamp(0, 1)


def _flat(shown: Shown, camera: Cameras, height: int, width: int) -> Tensor:
    side = min(height, width)
    image = shown.theta.render(camera.to(next(shown.theta.parameters()).device), side).image
    image = shown.decode(image) if shown.decode is not None else image
    image = torch.nn.functional.interpolate(image.float(), (side, side), mode="bilinear", antialias=True)[0].cpu().clamp(0, 1)
    top, left = (height - side) // 2, (width - side) // 2
    pads = (left, width - side - left, top, height - side - top)
    return torch.nn.functional.pad(image, pads, value=1.0)


def lay_out(panels: list[Tensor]) -> Tensor:
    """Lay (3, h, w) panels out in the rows of ``grid_of``; what is left over of the last row is white. Returns (1, 3, H, W)."""
    rows, columns = grid_of(len(panels))
    panels = panels + [torch.ones_like(panels[0])] * (rows * columns - len(panels))
    return torch.cat([torch.cat(panels[row * columns : (row + 1) * columns], -1) for row in range(rows)], -2)[None]
