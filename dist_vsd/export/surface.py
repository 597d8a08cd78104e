"""The surface of a particle, with the colour at each of its points: the one thing that meshes and textures are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from dist_vsd.export.seen_color import seen_colors
from dist_vsd.particles.iso_level import density_volume, march, suitable_threshold
from dist_vsd.particles.mesh import MeshParticle
from dist_vsd.particles.radiance_field import RadianceField

CHUNK_POINTS = 1 << 15  # of which each asks the field some times


@dataclasses.dataclass(frozen=True)
class Atlas:
    """A surface cut into charts that lie on the unit square.

    Attributes:
        vertex: (W,) of which vertex of the surface each of the atlas' vertices is a copy; those on a cut have several.
        faces: (F, 3) int32 into the atlas' vertices: the surface's, in their order.
        uv: (W, 2) fp32 places in [0, 1], to the right and, as in a picture and in glTF, downwards.
        num_charts: pieces.
    """

    vertex: np.ndarray
    faces: np.ndarray
    uv: np.ndarray
    num_charts: int


@dataclasses.dataclass(frozen=True)
class Surface:
    """Triangles in scene units, x to the front and z up, and what colour their points have.

    Attributes:
        vertices: (V, 3) fp32.
        faces: (F, 3) int32, counter-clockwise as seen from outside.
        color: gives (N, 3) colours as seen, sRGB, about [0, 1], of (N, 3) points on the surface; tensors on any one device.
        is_given: a user's own mesh, which stays as it is unless something else is asked for.
        atlas: where a user's own mesh has its texture, in so far as the file says; its places may be anywhere.
    """

    vertices: np.ndarray
    faces: np.ndarray
    color: Callable[[Tensor], Tensor]
    is_given: bool = False
    atlas: Atlas | None = None

    @torch.no_grad()
    def colors_at(self, points: np.ndarray) -> np.ndarray:
        """Return the (N, 3) fp32 colours in [0, 1] of (N, 3) points, asked for in chunks."""
        chunks = torch.from_numpy(np.ascontiguousarray(points, np.float32)).split(CHUNK_POINTS)
        return torch.cat([self.color(chunk).float().clamp(0, 1).cpu() for chunk in chunks]).numpy()


def find_surface(theta: RadianceField | MeshParticle, resolution: int, threshold: float = 0.0) -> Surface:
    """Return the surface of a particle in 3D, of whatever kind.

    Args:
        theta: a field, or a mesh, of which the rest does not matter.
        resolution: cells a side of the sampled cube.
        threshold: density of the surface, 1 / scene units; 0: the one that suits it (iso_level.suitable_threshold).

    Raises:
        ValueError: there is none.
    """
    if isinstance(theta, MeshParticle):
        return own_surface(theta)
    volume = density_volume(theta, resolution)
    return field_surface(theta, volume, threshold or suitable_threshold(theta, volume))


@torch.no_grad()
def own_surface(theta: MeshParticle) -> Surface:
    """Return the surface that a particle is; a user's own mesh keeps its places on a texture.

    Files repeat a vertex where its places on the texture, or its normals, differ: here it is one, or a closed object would be open.

    Raises:
        ValueError: nothing is left of it.
    """
    vertices, faces = theta.surface()
    if not len(faces):
        raise ValueError("its mesh has shrunk to nothing: take an earlier stage, or train with lower learning rates")
    device = vertices.device
    places, triangles = vertices.float().cpu().numpy(), faces.cpu().numpy().astype(np.int32)
    surface = Surface(places, triangles, lambda points: theta.color_at(points.to(device)))
    if not len(theta.given_faces):
        return surface
    places, vertex = np.unique(places, axis=0, return_inverse=True)
    vertex = vertex.reshape(-1)
    atlas = Atlas(vertex, triangles, theta.given_uv.cpu().numpy(), _num_parts(triangles)) if len(theta.given_uv) else None
    return dataclasses.replace(surface, vertices=places, faces=vertex[triangles].astype(np.int32), is_given=True, atlas=atlas)


def _num_parts(faces: np.ndarray) -> int:
    """Return how many parts (F, 3) faces make that have no vertex in common."""
    edges = faces[:, [0, 1, 1, 2]].reshape(-1, 2).T
    graph = coo_array((np.ones(edges.shape[1]), tuple(edges)), shape=(faces.max() + 1,) * 2)
    return len(np.unique(connected_components(graph, directed=False)[1][faces[:, 0]]))


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
