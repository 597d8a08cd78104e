"""Normals of a mesh's vertices."""

from __future__ import annotations

import torch
from torch import Tensor

SLIVER = 1e-3  # of the mean face's area: around a vertex of such faces alone the normal shrinks, and its gradient stays finite


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Return unit normals of vertices: the sum of their faces' normals, each weighted by its area.

    Faces whose vertices go around counter-clockwise are seen from the side that normals point to. Differentiable in the vertices. Around
    a vertex with slivers alone it is shorter, down to 0 where they are degenerate, or where there is no face.

    Args:
        vertices: (V, 3).
        faces: (F, 3) int64.

    Returns:
        (V, 3), of length 1 but for slivers.
    """
    a, b, c = vertices.index_select(0, faces.flatten()).view(-1, 3, 3).unbind(1)
    twice_area = torch.linalg.cross(b - a, c - a)
    total = torch.zeros_like(vertices).index_add(0, faces.flatten(), twice_area.repeat_interleave(3, 0))
    least = SLIVER * twice_area.detach().norm(dim=-1).sum() / max(1, len(faces))
    return total * ((total * total).sum(-1, keepdim=True) + least.square().clamp_min(1e-24)).rsqrt()
