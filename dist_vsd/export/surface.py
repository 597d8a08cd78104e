"""The surface of a radiance field: a mesh by marching cubes, or points, both with colours."""

from __future__ import annotations

import numpy as np
import torch
import trimesh
from skimage.measure import marching_cubes
from torch import Tensor

from dist_vsd.particles.radiance_field import RadianceField
from dist_vsd.particles.volume_rendering import cells_of

CHUNK_POINTS = 1 << 18
KINDS = ("mesh", "points")
VOLUME_BYTES = 16  # of a cell of the sampled cube, at the most: its density, a copy, and marching cubes' own


@torch.no_grad()
def density_volume(field: RadianceField, resolution: int) -> Tensor:
    """Evaluate the density at the centres of resolution^3 cells of the field's cube; (R, R, R), axes x, y, z.

    Where the occupancy grid is empty it is 0, as it is when the field is rendered.
    """
    bound, device = field.config.bound, next(field.parameters()).device
    axis = (torch.arange(resolution, device=device) + 0.5) / resolution * 2 * bound - bound
    volume = torch.zeros(resolution, resolution, resolution, device=device)
    num_planes = max(1, CHUNK_POINTS // resolution**2)
    for planes, density in zip(axis.split(num_planes), volume.split(num_planes), strict=True):
        points = torch.stack(torch.meshgrid(planes, axis, axis, indexing="ij"), -1).reshape(-1, 3)
        full = cells_of(points, field.occupancy.binaries[0], bound).nonzero().squeeze(-1)
        for index in full.split(CHUNK_POINTS):
            density.view(-1)[index] = field.density(points[index])
    return volume


@torch.no_grad()
def colors_at(field: RadianceField, points: Tensor) -> np.ndarray:
    """Return the (N, 3) uint8 colours of a field at (N, 3) points."""
    color = torch.cat([field(chunk)[1] for chunk in points.to(next(field.parameters()).device).split(CHUNK_POINTS)])
    return (color.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def surface_of(field: RadianceField, kind: str, resolution: int, threshold: float) -> trimesh.Trimesh | trimesh.PointCloud:
    """Find a field's surface, with a colour at each vertex.

    Args:
        field: the particle.
        kind: "mesh" (marching cubes, closed and facing outwards) or "points" (the centres of cells at the surface).
        resolution: cells a side of the sampled cube.
        threshold: density of the surface, 1 / scene units.

    Returns:
        A mesh, or a cloud of points, in scene units: x to the front, z up.

    Raises:
        ValueError: nothing is as dense as the threshold, or the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be {' or '.join(KINDS)}, got {kind!r}")
    volume = density_volume(field, resolution).cpu().numpy()
    solid = volume > threshold
    if not solid.any():
        raise ValueError(f"nothing is denser than --threshold {threshold:g}: the densest cell has {volume.max():.3g}; lower it")
    cell = 2 * field.config.bound / resolution
    if kind == "points":
        vertices, faces = np.argwhere(_surface_cells(solid)).astype(float), None
    else:
        vertices, faces = _march(volume, solid, threshold)
    vertices = (vertices + 0.5) * cell - field.config.bound
    colors = colors_at(field, torch.from_numpy(np.ascontiguousarray(vertices)).float())
    if faces is None:
        return trimesh.PointCloud(vertices, colors)
    return trimesh.Trimesh(vertices, faces, vertex_colors=colors, process=False)


def _surface_cells(solid: np.ndarray) -> np.ndarray:
    """Return which solid cells have a neighbour that is not, beyond the cube too."""
    padded = np.pad(solid, 1)
    inner = padded.copy()
    for axis in range(3):
        inner &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
    return (padded & ~inner)[1:-1, 1:-1, 1:-1]


def _march(volume: np.ndarray, solid: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices, in cells, and faces of the surface; a border of emptiness closes it where the object touches the cube."""
    low, high = [], []
    for axis in range(3):
        (filled,) = solid.any(tuple(other for other in range(3) if other != axis)).nonzero()
        low.append(max(0, filled[0] - 1))
        high.append(filled[-1] + 2)
    part = np.pad(volume[low[0] : high[0], low[1] : high[1], low[2] : high[2]], 1, constant_values=0.0)
    vertices, faces, _, _ = marching_cubes(part, threshold)
    return vertices - 1 + np.array(low), faces[:, ::-1]
