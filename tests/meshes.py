"""Meshes and cameras of which it is known what is seen."""

import math

import torch
import trimesh

from dist_vsd.cameras import look_at_origin

FOV_DEG, DISTANCE = 40.0, 3.0
HALF = math.tan(math.radians(FOV_DEG / 2))  # of the picture, at distance 1


def cameras(azimuth_deg=(0.0,), elevation_deg=20.0, distance=DISTANCE, dtype=torch.float64, device="cpu"):
    azimuth = torch.tensor(azimuth_deg, dtype=dtype)
    one = torch.ones_like(azimuth)
    return look_at_origin(azimuth, one * elevation_deg, one * distance, one * FOV_DEG).to(device, dtype)


def ball(subdivisions, dtype=torch.float64):
    """A ball of radius 1: 20 times 4^subdivisions faces."""
    mesh = trimesh.creation.icosphere(subdivisions=subdivisions)
    return torch.tensor(mesh.vertices, dtype=dtype), torch.tensor(mesh.faces)


def cube(side=1.0, dtype=torch.float64):
    mesh = trimesh.creation.box((side, side, side))
    return torch.tensor(mesh.vertices, dtype=dtype), torch.tensor(mesh.faces)


def rectangle(left, right, bottom, top, x=0.0, dtype=torch.float64):
    """Two triangles in the plane of x, which the camera of azimuth 0 and elevation 0 sees from the front; y to its right, z upwards."""
    corners = [(x, left, bottom), (x, right, bottom), (x, right, top), (x, left, top)]
    return torch.tensor(corners, dtype=dtype), torch.tensor([[0, 1, 2], [0, 2, 3]])


def soup(num_faces, seed=0, size=0.5, dtype=torch.float64):
    """Triangles anywhere in the cube, facing anywhere, through each other."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.rand(num_faces, 1, 3, generator=generator, dtype=torch.float64) * 2 - 1
    corners = middle + size * (torch.rand(num_faces, 3, 3, generator=generator, dtype=torch.float64) * 2 - 1)
    return corners.view(-1, 3).to(dtype), torch.arange(3 * num_faces).view(-1, 3)


def area_of_ball(radius):
    """The share of the picture that a ball in its middle covers: the cone that touches it has sin = radius / distance."""
    squared = (radius / DISTANCE) ** 2
    return math.pi * squared / (1 - squared) / (4 * HALF**2)


def intersections(vertices, faces, origins, directions):
    """Moeller and Trumbore 1997: t, u and v of (R,) rays with (F,) triangles, each (R, F), whether or not they are hit."""
    a, b, c = vertices[faces].unbind(1)
    across = torch.linalg.cross(directions[:, None], (c - a)[None])
    scale = 1.0 / (across * (b - a)).sum(-1)
    away = origins[:, None] - a
    u = (away * across).sum(-1) * scale
    turned = torch.linalg.cross(away, (b - a).expand_as(away))
    v = (directions[:, None] * turned).sum(-1) * scale
    return ((c - a) * turned).sum(-1) * scale, u, v
