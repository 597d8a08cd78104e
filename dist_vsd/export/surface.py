"""The surface of a particle, with the colour at each of its points: the one thing that meshes and textures are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dist_vsd.export.seen_color import seen_colors
from dist_vsd.particles.iso_level import density_volume, march, suitable_threshold
from dist_vsd.particles.radiance_field import RadianceField

KINDS = ("mesh", "points")
CHUNK_POINTS = 1 << 15  # of which each asks the field some times


@dataclasses.dataclass(frozen=True)
class Surface:
    """Triangles in scene units, x to the front and z up, and what colour their points have.

    Attributes:
        vertices: (V, 3) fp32.
        faces: (F, 3) int32, counter-clockwise as seen from outside.
        color: gives (N, 3) colours as seen, sRGB, about [0, 1], of (N, 3) points on the surface; tensors on any one device.
    """

    vertices: np.ndarray
    faces: np.ndarray
    color: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def colors_at(self, points: np.ndarray) -> np.ndarray:
        """Return the (N, 3) fp32 colours in [0, 1] of (N, 3) points, asked for in chunks."""
        chunks = torch.from_numpy(np.ascontiguousarray(points, np.float32)).split(CHUNK_POINTS)
        return torch.cat([self.color(chunk).float().clamp(0, 1).cpu() for chunk in chunks]).numpy()


class HasSurface(Protocol):
    """A particle that is a surface by itself."""

    def surface(self) -> tuple[Tensor, Tensor]:
        """Return (V, 3) vertices in scene units and (F, 3) faces."""

    def color_at(self, points: Tensor) -> Tensor:
        """Return the (N, 3) colours of (N, 3) points of the surface."""


def find_surface(theta: RadianceField | HasSurface, resolution: int, threshold: float = 0.0) -> Surface:
    """Return the surface of a particle in 3D, of whatever kind.

    Args:
        theta: a field, or what has a surface by itself, of which the rest does not matter.
        resolution: cells a side of the sampled cube.
        threshold: density of the surface, 1 / scene units; 0: the one that suits it (iso_level.suitable_threshold).

    Raises:
        ValueError: there is none.
    """
    if not isinstance(theta, RadianceField):
        return own_surface(theta)
    volume = density_volume(theta, resolution)
    return field_surface(theta, volume, threshold or suitable_threshold(theta, volume))


def own_surface(theta: HasSurface) -> Surface:
    """Return the surface that a particle is."""
    vertices, faces = (tensor.detach() for tensor in theta.surface())
    device = vertices.device
    places, triangles = vertices.float().cpu().numpy(), faces.cpu().numpy().astype(np.int32)
    return Surface(places, triangles, lambda points: theta.color_at(points.to(device)))


def field_surface(field: RadianceField, volume: Tensor, threshold: float) -> Surface:
    """Find a field's surface, closed and facing outwards, by marching cubes.

    Args:
        field: the particle.
        volume: its ``density_volume``.
        threshold: density of the surface, 1 / scene units.

    Raises:
        ValueError: nothing is as dense as the threshold.
    """
    densities = _require_solid(volume, threshold)
    vertices, faces = march(densities, threshold)
    places = _in_scene(field, vertices, len(volume))
    return Surface(places, np.ascontiguousarray(faces, np.int32), seen_colors(field, volume, threshold))


def surface_points(field: RadianceField, volume: Tensor, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the centres of the solid cells that have an empty neighbour, (N, 3), and their colours, (N, 3) in [0, 1].

    Args, Raises: see field_surface.
    """
    cells = np.argwhere(_surface_cells(_require_solid(volume, threshold) > threshold))
    points = _in_scene(field, cells, len(volume))
    return points, Surface(points, np.zeros((0, 3), np.int32), seen_colors(field, volume, threshold)).colors_at(points)


def _require_solid(volume: Tensor, threshold: float) -> np.ndarray:
    densities = volume.cpu().numpy()
    if not (densities > threshold).any():
        raise ValueError(f"nothing is denser than --threshold {threshold:g}: the densest cell has {densities.max():.3g}; lower it")
    return densities


def _in_scene(field: RadianceField, cells: np.ndarray, resolution: int) -> np.ndarray:
    """Convert (N, 3) places, in cells from the first one's centre, to where they are rendered, in scene units."""
    places = (cells + 0.5) * (2 * field.config.bound / resolution) - field.config.bound
    return (places - field.center.cpu().numpy()).astype(np.float32)


def _surface_cells(solid: np.ndarray) -> np.ndarray:
    """Return which solid cells have a neighbour that is not, beyond the cube too."""
    padded = np.pad(solid, 1)
    inner = padded.copy()
    for axis in range(3):
        inner &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
    return (padded & ~inner)[1:-1, 1:-1, 1:-1]
