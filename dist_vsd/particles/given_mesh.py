"""A user's own mesh to begin from: read from a file, put into the cube, and, to be refined, as signed distances on the lattice."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import label
from scipy.spatial import cKDTree
from torch import Tensor

from dist_vsd.particles.mesh_start import lattice_points

SUFFIXES = (".glb", ".gltf", ".obj", ".ply")
Y_UP = (".glb", ".gltf", ".obj")  # as glTF has it and most programs write OBJ; PLY is taken with z up, as export writes it
MOST_FACES = 5_000_000
FILLS = 0.8  # of the cube: the longest side of the object's box
# Points on the surface are this far apart, cells, and a vertex of the lattice this near to one is on the surface, whatever its side.
SPACING, ON_SURFACE = 0.3, 1.2


@dataclasses.dataclass(frozen=True)
class GivenMesh:
    """A mesh, z up and its front to x.

    Attributes:
        vertices: (V, 3) fp32, scene units, in the middle of the cube.
        faces: (F, 3) int64.
        uv: (V, 2) fp32 places on its texture, to the right and downwards; (0, 2) where it has none.
    """

    vertices: Tensor
    faces: Tensor
    uv: Tensor


def read_mesh(file: Path, bound: float) -> GivenMesh:
    """Read a mesh from a GLB, glTF, OBJ or PLY file, centre it, and scale it to fill the cube of [-bound, bound]^3 to FILLS.

    Raises:
        ValueError: the file can't be read, or holds no mesh, or too large a one.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--init-mesh {file}: must be one of {', '.join(SUFFIXES)}: convert it")
    if not file.is_file():
        raise ValueError(f"--init-mesh {file}: there is no such file: check the path")
    mesh = _read(file)
    if not len(mesh.faces) or not np.isfinite(mesh.vertices).all() or not np.ptp(mesh.vertices, axis=0).max() > 0:
        raise ValueError(f"--init-mesh {file}: it holds no triangles of finite size: check the file")
    if len(mesh.faces) > MOST_FACES:
        raise ValueError(f"--init-mesh {file}: has {len(mesh.faces):,} faces, at most {MOST_FACES:,} are taken: decimate it first")
    vertices = np.asarray(mesh.vertices, np.float64)
    if file.suffix.lower() in Y_UP:
        vertices = vertices[:, [2, 0, 1]]  # z, x, y of theirs are x, y, z of ours
    low, high = vertices.min(0), vertices.max(0)
    vertices = (vertices - (low + high) / 2) * (2 * bound * FILLS / (high - low).max())
    uv = getattr(mesh.visual, "uv", None)
    has_uv = uv is not None and len(uv) == len(vertices) and np.isfinite(uv).all()
    places = np.stack([uv[:, 0], 1 - uv[:, 1]], -1) if has_uv else np.zeros((0, 2))  # trimesh counts v upwards
    as_tensor = torch.from_numpy
    faces = as_tensor(np.ascontiguousarray(mesh.faces, np.int64))
    return GivenMesh(as_tensor(vertices.astype(np.float32)), faces, as_tensor(places.astype(np.float32)))


def _read(file: Path):  # noqa: ANN202 - trimesh's type, which is imported where it is needed alone
    import trimesh

    try:
        scene = trimesh.load_scene(file, process=False)
        return scene.to_mesh()
    except Exception as error:  # whatever a damaged file makes a reader raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise ValueError(f"--init-mesh {file}: it can't be read ({reason}): check the file") from error


def distances_to(mesh: GivenMesh, resolution: int, bound: float) -> Tensor:
    """Return the (S, S, S) signed distances, in cells and negative inside, of the vertices of a lattice over [-bound, bound]^3.

    The mesh need not be closed, nor of one piece: outside is what can be reached from the cube's border without coming within ON_SURFACE
    cells of the surface; what is that near is on the side that the nearest face's normal says, so that a sheet becomes a thin solid.
    """
    points, normals = _on_surface(mesh, SPACING * 2 * bound / resolution)
    lattice = lattice_points(resolution, bound).numpy()
    cell = 2 * bound / resolution
    away, nearest = cKDTree(points).query(lattice, workers=-1)
    along = ((lattice - points[nearest]) * normals[nearest]).sum(1)
    side = (resolution + 1,) * 3
    is_near = (away < ON_SURFACE * cell).reshape(side)
    parts, _ = label(~is_near)
    is_inside = np.where(is_near, along.reshape(side) < 0, parts != parts[0, 0, 0])
    for axis in range(3):
        np.moveaxis(is_inside, axis, 0)[[0, -1]] = False
    distance = np.where(is_near.reshape(-1), np.abs(along), away) / cell
    return torch.from_numpy(np.where(is_inside.reshape(-1), -distance, distance).astype(np.float32)).reshape(side)


def _on_surface(mesh: GivenMesh, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw points on a surface that are about ``spacing`` apart, always the same, and return them with the normals of their faces."""
    import trimesh

    surface = trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)
    count = int(np.clip(4 * surface.area / spacing**2, 1000, 4_000_000))
    points, face = trimesh.sample.sample_surface(surface, count, seed=0)
    centers = surface.triangles_center  # thin faces too have a point
    return np.concatenate([points, centers]), np.concatenate([surface.face_normals[face], surface.face_normals])
