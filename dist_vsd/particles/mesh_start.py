"""Where a mesh begins: the signed distance to the surface of a radiance field, or to a ball where the field has none worth the name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from scipy.ndimage import binary_erosion, binary_fill_holes, distance_transform_edt, label
from torch import Tensor

CHUNK_POINTS = 1 << 18
# Of the vertices: fewer are no object, and more are a cube full of fog.
LEAST_SHARE, MOST_SHARE = 2e-4, 0.6


@dataclasses.dataclass(frozen=True)
class Solid:
    """What is inside of a surface.

    Attributes:
        inside: (S, S, S) bool, vertices of the lattice; never those of its border.
        num_removed: fragments that were left out.
        fault: what is wrong with it, in words; empty where it is an object.
    """

    inside: np.ndarray
    num_removed: int
    fault: str


def lattice_points(resolution: int, bound: float) -> Tensor:
    """Return the ((R + 1)^3, 3) vertices of a lattice over [-bound, bound]^3."""
    axis = torch.linspace(-bound, bound, resolution + 1)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)


@torch.no_grad()
def values_on_lattice(function: Callable[[Tensor], Tensor], resolution: int, bound: float) -> Tensor:
    """Return the (S, S, S) values of a function of (N, 3) points at the vertices of a lattice, S = R + 1."""
    points = lattice_points(resolution, bound)
    return torch.cat([function(chunk) for chunk in points.split(CHUNK_POINTS)]).reshape((resolution + 1,) * 3)


def solid_of(density: np.ndarray, threshold: float, least_fragment: float, hidden: np.ndarray | None = None) -> Solid:
    """Find what is denser than a threshold, with all that it encloses or hides, and without small fragments.

    Args:
        density: (S, S, S) at the vertices of a lattice.
        threshold: of the surface.
        least_fragment: parts with less than this share of the largest part's vertices are fragments.
        hidden: (S, S, S) bool, what no camera sees; None: nothing is known to be. Of it what is next to something that is seen does not
            count: just before a surface some of the light is lost already.
    """
    inside = density > threshold
    if hidden is not None and inside.any():
        inside |= binary_erosion(hidden)
    for axis in range(3):  # the surface closes before the cube's sides
        np.moveaxis(inside, axis, 0)[[0, -1]] = False
    parts, num_parts = label(inside)
    sizes = np.bincount(parts.reshape(-1), minlength=num_parts + 1)
    sizes[0] = 0
    kept = sizes >= max(1.0, least_fragment * sizes.max())
    inside = binary_fill_holes(kept[parts])
    share = float(inside.mean())
    fault = ""
    if not inside.any():
        fault = f"nothing is denser than {threshold:.3g}, the densest vertex has {float(density.max()):.3g}"
    elif share < LEAST_SHARE:
        fault = f"what is denser than {threshold:.3g} fills {share:.4%} of the cube alone"
    elif share > MOST_SHARE:
        fault = f"what is denser than {threshold:.3g} fills {share:.0%} of the cube"
    return Solid(inside, num_parts - int(kept.sum()), fault)


def distances_from(density: np.ndarray, inside: np.ndarray, threshold: float) -> Tensor:
    """Return the (S, S, S) signed distances, in cells and negative inside, to the surface of a solid.

    Next to the surface it is in proportion to how far the density is from the threshold, so that the surface is where the density passes
    it on each edge; farther away it is the distance to the nearest vertex of the other side, less half a cell.
    """
    away = np.where(inside, distance_transform_edt(inside), distance_transform_edt(~inside))
    below = np.abs(density - threshold)
    is_told = (away <= 1.0) & ((density > threshold) == inside)
    scale = 2 * np.median(below[is_told]) if is_told.any() else 1.0  # the median vertex is half a cell away
    near = np.where(is_told, np.clip(below / max(scale, 1e-6), 0.02, 1.0), 0.5)
    distance = np.where(away <= 1.0, near, away - 0.5)
    return torch.from_numpy(np.where(inside, -distance, distance).astype(np.float32))


def ball(resolution: int, bound: float, radius: float) -> Tensor:
    """Return the (S, S, S) signed distances, in cells, to a ball in the middle of the cube, within it."""
    distance = lattice_points(resolution, bound).norm(dim=-1) - min(radius, 0.9 * bound)
    return (distance / (2 * bound / resolution)).reshape((resolution + 1,) * 3)
