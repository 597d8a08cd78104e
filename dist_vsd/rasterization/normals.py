"""Normals of a mesh's vertices."""

from __future__ import annotations

import torch
from torch import Tensor

NO_AREA = 1e-30  # of a squared sum of face normals, scene units^4: below it rounding alone says where it points


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Return unit normals of vertices: the sum of their faces' normals, each weighted by its area.

    Faces whose vertices go around counter-clockwise are seen from the side that normals point to. Differentiable in the vertices. Vertices
    without a face, or with degenerate ones alone, have the normal 0 and no gradient through it.

    Args:
        vertices: (V, 3).
        faces: (F, 3) int64.

    Returns:
        (V, 3) of length 1 or 0.
    """
    a, b, c = vertices.index_select(0, faces.flatten()).view(-1, 3, 3).unbind(1)
    twice_area = torch.linalg.cross(b - a, c - a)
    total = torch.zeros_like(vertices).index_add(0, faces.flatten(), twice_area.repeat_interleave(3, 0))
    squared = (total * total).sum(-1, keepdim=True)
    has_area = squared > NO_AREA
    return torch.where(has_area, total, 0.0) * torch.where(has_area, squared, 1.0).rsqrt()
