"""What keeps a surface smooth while it is optimised; pure functions of its vertices and faces."""

from __future__ import annotations

import torch
from torch import Tensor


def edges_of(faces: Tensor) -> Tensor:
    """Return (3 F, 2) the edges of each of (F, 3) faces, in the direction in which they go around it."""
    return torch.stack([faces, faces.roll(-1, 1)], -1).reshape(-1, 2)


def pairs_of_faces(faces: Tensor) -> Tensor:
    """Return (E, 2) the faces on both sides of each edge that two faces share.

    Args:
        faces: (F, 3) of a surface of which no edge has more than two faces.
    """
    ends = edges_of(faces).sort(-1).values
    keys = ends[:, 0] * (faces.max() + 1 if len(faces) else 1) + ends[:, 1]
    ordered, order = keys.sort(stable=True)
    twice = (ordered[1:] == ordered[:-1]).nonzero().squeeze(-1)
    return torch.stack([order[twice], order[twice + 1]], -1) // 3


def normal_consistency(vertices: Tensor, faces: Tensor) -> Tensor:
    """Return the mean over edges of 1 - n . n', the normals of the two faces that meet there: 0 where all is flat.

    An edge weighs as much as the product of its faces' areas: slivers, whose normals mean nothing, hardly count.
    """
    a, b, c = vertices[faces].unbind(1)
    doubled = torch.linalg.cross(b - a, c - a)  # the normal, as long as twice the area
    one, other = doubled[pairs_of_faces(faces)].unbind(1)
    weight = one.norm(dim=-1) * other.norm(dim=-1)
    return (weight - (one * other).sum(-1)).sum() / weight.detach().sum().clamp_min(1e-20)


def laplacian(vertices: Tensor, faces: Tensor) -> Tensor:
    """Return the mean over vertices of |v - mean of its neighbours|^2, in the square of the vertices' unit."""
    ends = edges_of(faces)  # on a closed surface each edge comes once in each direction
    count = vertices.new_zeros(len(vertices)).index_add_(0, ends[:, 0], vertices.new_ones(len(ends)))
    sums = torch.zeros_like(vertices).index_add(0, ends[:, 0], vertices[ends[:, 1]])
    away = vertices - sums / count.clamp_min(1)[:, None]
    return away.square().sum() / max(1, len(vertices))
