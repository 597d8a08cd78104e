"""How near a mesh's surface is to the known scene's: Chamfer distance and normal consistency, as reconstruction is measured by."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import trimesh
from scipy.spatial import cKDTree
from torch import Tensor

from dist_vsd.evaluation.overlap import Overlap, scene_distance

NUM_POINTS, SHELL, NUM_PROJECTIONS, STEP = 4000, 0.05, 12, 1e-3


@dataclasses.dataclass(frozen=True)
class SurfaceDistance:
    """How far two surfaces are from each other.

    Attributes:
        chamfer: mean of the distances from points of one to the other, the mean of both directions, scene units.
        normal_consistency: mean |n . n'| of the normals there, in [0, 1].
    """

    chamfer: float
    normal_consistency: float


def scene_surface(name: str, overlap: Overlap, bound: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw points of a known scene's surface, and their normals.

    Points of a thin shell around it are drawn, evenly, and moved to the surface along the distance's gradient.

    Args:
        name: of the object.
        overlap: its turn and scale.
        bound: half the side of the cube that holds it.
        generator: on the CPU.

    Returns:
        points and unit normals, (NUM_POINTS, 3) each.
    """
    found: list[Tensor] = []
    while sum(map(len, found)) < NUM_POINTS:
        points = (2 * torch.rand(200_000, 3, generator=generator) - 1) * bound
        found.append(points[_distance(name, overlap, points).abs() < SHELL])
    points = torch.cat(found)[:NUM_POINTS]
    for _ in range(NUM_PROJECTIONS):
        points = points - _distance(name, overlap, points)[:, None] * _normals(name, overlap, points)
    return points, _normals(name, overlap, points)


def _distance(name: str, overlap: Overlap, points: Tensor) -> Tensor:
    return scene_distance(name, overlap.turn_deg, overlap.scale, points) * overlap.scale


def _normals(name: str, overlap: Overlap, points: Tensor) -> Tensor:
    steps = STEP * torch.eye(3)
    slopes = [_distance(name, overlap, points + step) - _distance(name, overlap, points - step) for step in steps]
    return torch.nn.functional.normalize(torch.stack(slopes, -1), dim=-1)


def surface_distance(vertices: Tensor, faces: Tensor, name: str, overlap: Overlap, bound: float) -> SurfaceDistance:
    """Compare a mesh with a known scene, at the turn and scale at which their volumes have the most in common.

    Args:
        vertices: (V, 3), scene units.
        faces: (F, 3).
        name: of the object.
        overlap: of the mesh with the scene.
        bound: half the side of the cube that holds both.
    """
    generator = torch.Generator().manual_seed(0)
    theirs, their_normals = (tensor.double().numpy() for tensor in scene_surface(name, overlap, bound, generator))
    mesh = trimesh.Trimesh(vertices.detach().cpu().numpy(), faces.cpu().numpy(), process=False)
    ours, face = trimesh.sample.sample_surface(mesh, NUM_POINTS, seed=0)
    our_normals = mesh.face_normals[face]
    to_theirs, nearest_there = cKDTree(theirs).query(ours)
    to_ours, nearest_here = cKDTree(ours).query(theirs)
    cosines = (our_normals * their_normals[nearest_there]).sum(1), (their_normals * our_normals[nearest_here]).sum(1)
    agreement = sum(float(np.abs(cosine).mean()) for cosine in cosines) / 2
    return SurfaceDistance(float(to_theirs.mean() + to_ours.mean()) / 2, agreement)
