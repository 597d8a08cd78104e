"""A radiance field as PLY: a mesh by marching cubes, or points, both with colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import trimesh
from skimage.measure import marching_cubes
from torch import Tensor

from dist_vsd.particles.radiance_field import RadianceField

CHUNK_POINTS = 1 << 18


@torch.no_grad()
def density_volume(field: RadianceField, resolution: int) -> Tensor:
    """Evaluate the density at the centres of resolution^3 cells of the field's cube; (R, R, R), axes x, y, z."""
    bound, device = field.config.bound, next(field.parameters()).device
    axis = (torch.arange(resolution, device=device) + 0.5) / resolution * 2 * bound - bound
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    return torch.cat([field.density(chunk) for chunk in points.split(CHUNK_POINTS)]).reshape(resolution, resolution, resolution)


@torch.no_grad()
def colors_at(field: RadianceField, points: Tensor) -> np.ndarray:
    """Return the (N, 3) uint8 colours of a field at (N, 3) points."""
    color = torch.cat([field(chunk)[1] for chunk in points.to(next(field.parameters()).device).split(CHUNK_POINTS)])
    return (color.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def write_ply(field: RadianceField, file: Path, kind: str, resolution: int, threshold: float) -> int:
    """Write a field's surface.

    Args:
        field: the particle.
        file: to write.
        kind: "mesh" (marching cubes) or "points" (the centres of cells at the surface).
        resolution: cells a side of the sampled cube.
        threshold: density of the surface, 1 / scene units.

    Returns:
        The number of vertices.

    Raises:
        ValueError: nothing is as dense as the threshold, or the kind is unknown.
    """
    if kind not in ("mesh", "points"):
        raise ValueError(f"kind must be mesh or points, got {kind!r}")
    volume = density_volume(field, resolution).cpu().numpy()
    if not (volume > threshold).any():
        raise ValueError(f"nothing is denser than --threshold {threshold:g}: the densest cell has {volume.max():.3g}; lower it")
    bound, cell = field.config.bound, 2 * field.config.bound / resolution
    if kind == "points":
        solid = np.pad(volume > threshold, 1)
        inner = solid.copy()
        for axis in range(3):
            inner &= np.roll(solid, 1, axis) & np.roll(solid, -1, axis)
        index = np.argwhere((solid & ~inner)[1:-1, 1:-1, 1:-1])
        vertices, faces = (index + 0.5) * cell - bound, None
    else:
        # A border of emptiness closes the surface where the object touches the cube.
        padded = np.pad(volume, 1, constant_values=0.0)
        vertices, faces, _, _ = marching_cubes(padded, threshold)
        vertices, faces = (vertices - 0.5) * cell - bound, faces[:, ::-1]
    colors = colors_at(field, torch.from_numpy(np.ascontiguousarray(vertices)).float())
    file.parent.mkdir(parents=True, exist_ok=True)
    if faces is None:
        trimesh.PointCloud(vertices, colors).export(file)
    else:
        trimesh.Trimesh(vertices, faces, vertex_colors=colors, process=False).export(file)
    return len(vertices)
