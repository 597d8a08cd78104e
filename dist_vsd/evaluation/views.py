"""The cameras of an evaluation, and the one place where its pictures are made."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras, look_at_origin, turntable
from dist_vsd.config import CameraConfig
from dist_vsd.export.turntable import render_views
from dist_vsd.runs.saved_run import SavedRun

# Vertical fields of view of T3Bench's five cameras (its render/meshrender.py), as shares of the middle one.
FOCAL_FACTORS = (60 / 36, 45 / 36, 1.0, 30 / 36, 24 / 36)


def middle_of(camera: CameraConfig) -> tuple[float, float]:
    """Return the distance and the field of view, degrees, in the middle of the training cameras'."""
    return sum(camera.distance) / 2, sum(camera.fov_deg) / 2


def turns(camera: CameraConfig, num_azimuths: int, elevations_deg: tuple[float, ...]) -> Cameras:
    """Return one turn at each elevation, at the middle of the training cameras; azimuths turn fastest, the front comes first."""
    return Cameras.cat([turntable(num_azimuths, elevation, *middle_of(camera)) for elevation in elevations_deg])


@dataclasses.dataclass(frozen=True)
class Sphere:
    """Cameras all around: at each of N viewpoints F focal lengths.

    Attributes:
        cameras: N * F, those of a viewpoint together.
        neighbours: of each viewpoint, those that an edge of the icosphere joins to it.
    """

    cameras: Cameras
    neighbours: list[list[int]]


def sphere(camera: CameraConfig, subdivisions: int) -> Sphere:
    """Place cameras on the vertices of an icosphere, as T3Bench does (He et al. 2023, arXiv 2310.02977, section on quality).

    T3Bench's object is scaled to a cube and its cameras stand 2.2 away; ours stand at the middle of the training cameras' distance, with
    its five focal lengths around the middle of theirs.

    Args:
        camera: of the run.
        subdivisions: of the icosahedron: 0 has 12 viewpoints, 1 has 42, 2 (T3Bench's) 162.
    """
    import trimesh  # half a second, which every run that looks at its particles would pay

    mesh = trimesh.creation.icosphere(subdivisions=subdivisions)
    points = torch.tensor(mesh.vertices, dtype=torch.float32)
    azimuth, elevation = torch.rad2deg(torch.atan2(points[:, 1], points[:, 0])), torch.rad2deg(points[:, 2].clamp(-1, 1).asin())
    distance, fov_deg = middle_of(camera)
    num_focal = len(FOCAL_FACTORS)
    fovs = (torch.tensor(FOCAL_FACTORS) * fov_deg).clamp_max(120.0).repeat(len(points))
    poses = (azimuth.repeat_interleave(num_focal), elevation.repeat_interleave(num_focal))
    neighbours: list[list[int]] = [[] for _ in points]
    for a, b in mesh.edges_unique.tolist():
        neighbours[a].append(b)
        neighbours[b].append(a)
    return Sphere(look_at_origin(*poses, torch.full_like(fovs, distance), fovs), neighbours)


def capture(saved: SavedRun, cameras: Cameras) -> list[Tensor]:
    """Render every particle of a run; flat particles, which are the same from everywhere, once.

    Args:
        saved: of a run.
        cameras: V of them.

    Returns:
        (V, 3, H, W) pictures in [0, 1] on the CPU, V = 1 for flat particles, for each particle in the order of the ids.
    """
    chosen = cameras[:1] if saved.config.is_flat else cameras
    views = []
    for theta in saved.particles.values():
        device = next(theta.parameters()).device
        views.append(render_views(theta, chosen.to(device), saved.config.render_size, saved.decode))
    return views
