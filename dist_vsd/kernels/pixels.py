"""Where pixels' centres are, and where in a face: the arithmetic on which all implementations of a rasteriser agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NEAR = 0.01  # scene units along the viewing axis; what is nearer to the camera is not seen
MARGIN = 1 / 64  # pixels that the box around a face is larger: far more than rounding moves its edges by
NOTHING = torch.iinfo(torch.int64).max  # in a z-buffer of depths' bits and faces
Corners = Sequence[Tensor]  # one number of the three vertices of faces


def unpacked(nearest: Tensor) -> Tensor:
    """Return the faces in a z-buffer whose entries are the 32 bits of a depth above the 32 bits of a face; -1 for NOTHING."""
    return torch.where(nearest == NOTHING, -1, nearest & 0xFFFFFFFF)


def decisive(clip: Tensor) -> Tensor:
    """Return (B, V, 3) x, y and w, in fp32, of (B, V, 4) clip coordinates: what decides which face is seen."""
    x, y, _, w = clip.detach().float().unbind(-1)
    return torch.stack([x, y, w], -1)


def pixel_centres(row: Tensor, column: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x and y, in [-1, 1], y upwards, of the centres of pixels."""
    return (2 * column + (1 - size)).to(dtype) / size, ((size - 1) - 2 * row).to(dtype) / size


def edge_functions(x: Corners, y: Corners, w: Corners, centre_x: Tensor, centre_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return e_0, e_1 and e_2, in proportion to the barycentric coordinates of pixels' centres; differentiable.

    With x' = x - p_x w and y' = y - p_y w for a centre p, e_0 = x'_1 y'_2 - y'_1 x'_2 and so on (Olano and Greer 1997, "Triangle scan
    conversion using 2D homogeneous coordinates"): perspective-correct, and without a division by w, which may be negative.

    Args:
        x, y, w: of a face's three vertices in clip space, (...,) each.
        centre_x, centre_y: (...,) or what broadcasts.
    """
    x0, x1, x2 = (at - centre_x * far for at, far in zip(x, w, strict=True))
    y0, y1, y2 = (at - centre_y * far for at, far in zip(y, w, strict=True))
    return x1 * y2 - y1 * x2, x2 * y0 - y2 * x0, x0 * y1 - y0 * x1
