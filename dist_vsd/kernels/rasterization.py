"""Which face of a mesh is nearest in each pixel: a z-buffer, with the same arithmetic in Triton, in C and in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vsd.kernels import c_kernels
from dist_vsd.kernels.choice import serving
from dist_vsd.kernels.pixels import MARGIN, NEAR, NOTHING, decisive, edge_functions, pixel_centres, unpacked

NUM_AT_ONCE = 1 << 18  # pairs of a face and a pixel that plain torch looks at together


@torch.no_grad()
def nearest_faces(clip: Tensor, faces: Tensor, size: int) -> Tensor:
    """Find the face that each pixel's centre sees.

    A face is hit where no two of its edge functions (pixels.edge_functions) have different signs. They need no division by w, so what
    lies nearer than NEAR is clipped away pixel by pixel, however large the face. Those of an edge's two faces are the negatives of each
    other to the bit: there are no gaps between faces, and where a centre is on an edge both are hit. Both sides of a face are seen.

    Decided in fp32 whatever clip's precision, with the same bits by every implementation. Not differentiable.

    Args:
        clip: (B, V, 4) of x, y, z, w: a vertex is seen at (x / w, y / w), y upwards, and w is its distance along the viewing axis.
        faces: (F, 3) int64, vertices of each face.
        size: pixels a side.

    Returns:
        (B, size, size) int64, rows from the top: the nearest face, of several equally near ones the first; -1 where there is none. A
        face with a vertex that is no finite number is left out.
    """
    xyw, faces = decisive(clip), faces.contiguous()
    if not xyw.is_meta and xyw.numel() and faces.numel():
        by = serving(xyw)
        if by == "triton":
            from dist_vsd.kernels.rasterization_triton import nearest_faces as in_triton

            return in_triton(xyw, faces, size)
        return c_kernels.nearest_faces(xyw, faces, size, NEAR, MARGIN) if by == "c" else _nearest_faces(xyw, faces, size)
    return torch.full((len(clip), size, size), -1, device=clip.device, dtype=torch.int64)


def _nearest_faces(xyw: Tensor, faces: Tensor, size: int) -> Tensor:
    """The same in plain torch: pairs of a face and a pixel of its box, some at a time, each the smallest of a depth's bits and a face."""
    corners = xyw[:, faces].flatten(0, 1)  # (B F, 3, 3)
    top, left, height, width = _boxes(corners, size)
    ends = (height * width).cumsum(0)
    nearest = torch.full((len(xyw) * size * size,), NOTHING, device=xyw.device)
    total = int(ends[-1])  # CPU-GPU sync, one a call: boxes have as many pixels as they have
    for first in range(0, total, NUM_AT_ONCE):
        pair = torch.arange(first, min(total, first + NUM_AT_ONCE), device=xyw.device)
        at = torch.searchsorted(ends, pair, right=True)
        within, across = pair - (ends[at] - height[at] * width[at]), width[at]
        row, column = top[at] + within // across, left[at] + within % across
        is_hit, depth = _hits(corners[at], row, column, size)
        key = torch.where(is_hit, (depth.view(torch.int32).long() << 32) | at % len(faces), NOTHING)
        nearest.scatter_reduce_(0, (at // len(faces) * size + row) * size + column, key, "amin")
    return unpacked(nearest).view(len(xyw), size, size)


def _boxes(corners: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return top, left, height and width, int64, of the boxes around (N, 3, 3) faces' pixels.

    No pixels of what is not seen, all of them of what reaches through the plane of NEAR.
    """
    x, y, w = corners.unbind(-1)
    is_seen = (corners - corners == 0).all(-1).all(-1) & (w > NEAR).any(-1)
    is_cut = (w <= NEAR).any(-1)
    half = size * 0.5
    w = w.clamp_min(NEAR)
    left, width = _span((x / w + 1.0) * half - 0.5, is_seen, is_cut, size)
    top, height = _span((-y / w + 1.0) * half - 0.5, is_seen, is_cut, size)
    return top, left, height, width


def _span(at: Tensor, is_seen: Tensor, is_cut: Tensor, size: int) -> tuple[Tensor, Tensor]:
    first = torch.where(is_cut, 0, (at.amin(-1) - MARGIN).clamp(0.0, size * 1.0).ceil())
    last = torch.where(is_cut, size - 1.0, (at.amax(-1) + MARGIN).clamp(-1.0, size - 1.0).floor())
    count = torch.where(is_seen, (last - first + 1.0).clamp_min(0.0), 0.0)
    return torch.where(is_seen, first, 0.0).long(), count.long()


def _hits(corners: Tensor, row: Tensor, column: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Say whether pixels' centres hit their faces, and at which depths."""
    x, y, w = (values.unbind(-1) for values in corners.unbind(-1))
    e = edge_functions(x, y, w, *pixel_centres(row, column, size, corners.dtype))
    total = e[0] + e[1] + e[2]
    depth = (e[0] * w[0] + e[1] * w[1] + e[2] * w[2]) / torch.where(total == 0, 1.0, total)
    inside = ((e[0] >= 0) & (e[1] >= 0) & (e[2] >= 0)) | ((e[0] <= 0) & (e[1] <= 0) & (e[2] <= 0))
    return inside & (total != 0) & (depth > NEAR), depth  # a total of 0 is a face without area
