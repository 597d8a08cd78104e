"""What keeps a surface smooth while it is optimised; pure functions of its vertices and faces."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vsd.rasterization.edges import faces_across


def normal_consistency(vertices: Tensor, faces: Tensor) -> Tensor:
    """Return the mean over edges of 1 - n . n', the normals of the two faces that meet there: 0 where all is flat.

    An edge weighs as much as the product of its faces' areas: slivers, whose normals mean nothing, hardly count.

    Args:
        vertices: (V, 3).
        faces: (F, 3); edges without a second face don't count.

    Returns:
        A scalar in [0, 2]; differentiable in the vertices.
    """
    across, _ = faces_across(faces)  # which antialiasing asks for, too: it is found once
    a, b, c = vertices[faces].unbind(1)
    doubled = torch.linalg.cross(b - a, c - a)  # the normal, as long as twice the area
    # A face more stands for what is across a border; each edge is met from both of its faces.
    other = torch.cat([doubled, torch.zeros_like(doubled[:1])])[across] if len(faces) else doubled[:, None]
    weight = doubled.norm(dim=-1)[:, None] * other.norm(dim=-1)
    return (weight - (doubled[:, None] * other).sum(-1)).sum() / weight.detach().sum().clamp_min(1e-20)


def laplacian(vertices: Tensor, faces: Tensor) -> Tensor:
    """Return the mean over vertices of |v - mean of its neighbours|^2, in the square of the vertices' unit.

    Args:
        vertices: (V, 3).
        faces: (F, 3) of a closed surface, on which each edge comes once in each direction.

    Returns:
        A scalar; differentiable in the vertices.
    """
    ends = torch.stack([faces, faces.roll(-1, 1)], -1).reshape(-1, 2)
    count = vertices.new_zeros(len(vertices)).index_add_(0, ends[:, 0], vertices.new_ones(len(ends)))
    sums = torch.zeros_like(vertices).index_add(0, ends[:, 0], vertices[ends[:, 1]])
    away = vertices - sums / count.clamp_min(1)[:, None]
    return away.square().sum() / max(1, len(vertices))
