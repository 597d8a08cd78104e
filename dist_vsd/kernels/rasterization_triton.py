"""rasterization.py in Triton: a program paints a few small faces, or a part of a large one, into a z-buffer of depth bits and faces."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_vsd.kernels.launch import launch
from dist_vsd.kernels.pixels import MARGIN, NEAR, NOTHING, unpacked

SMALL = 256  # pixels of a box, beyond which a face has programs of its own
FEW = 65536  # programs for large faces, one a face, beside which there is room for several a face
_SHARED = {"NEAR": NEAR, "MARGIN": MARGIN, "SMALL": SMALL}
CONSTANTS = {"FACES": 16, "PIXELS": 8, "LARGE": False} | _SHARED
OF_LARGE_FACES = {"FACES": 1, "PIXELS": 256, "LARGE": True} | _SHARED
# Of the kernel: the types of its arguments and its constants, for compilation without a GPU.
_ARGUMENTS = {"xyw": "*fp32", "faces": "*i64", "nearest": "*i64", "num_vertices": "i32", "num_faces": "i32", "size": "i32"}
SIGNATURES = {"paint_kernel": (_ARGUMENTS, CONSTANTS)}


def nearest_faces(xyw: Tensor, faces: Tensor, size: int) -> Tensor:
    """Return the face that each pixel sees; see rasterization.nearest_faces."""
    num_images, num_vertices, _ = xyw.shape
    nearest = torch.full((num_images, size, size), NOTHING, device=xyw.device, dtype=torch.int64)
    arguments = (xyw, faces, nearest, num_vertices, len(faces), size)
    launch(paint_kernel, (triton.cdiv(len(faces), CONSTANTS["FACES"]), num_images, 1), *arguments, **CONSTANTS)
    parts = max(1, min(16, FEW // len(faces), triton.cdiv(size * size, OF_LARGE_FACES["PIXELS"])))
    if size * size > SMALL:
        launch(paint_kernel, (len(faces), num_images, parts), *arguments, **OF_LARGE_FACES)
    return unpacked(nearest)


@triton.jit
def paint_kernel(
    xyw, faces, nearest, num_vertices, num_faces, size,
    FACES: tl.constexpr, PIXELS: tl.constexpr, LARGE: tl.constexpr, NEAR: tl.constexpr, MARGIN: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """Paint a block of faces into one picture; atomically, so that the result does not depend on their order."""
    image = tl.program_id(1).to(tl.int64)
    face = tl.program_id(0) * FACES + tl.arange(0, FACES)[:, None]
    real = face < num_faces
    first = xyw + image * num_vertices * 3
    x0, y0, w0 = _corner(first, faces + face.to(tl.int64) * 3, real)
    x1, y1, w1 = _corner(first, faces + face.to(tl.int64) * 3 + 1, real)
    x2, y2, w2 = _corner(first, faces + face.to(tl.int64) * 3 + 2, real)
    finite = _finite(x0, y0, w0) & _finite(x1, y1, w1) & _finite(x2, y2, w2)
    seen = real & finite & ((w0 > NEAR) | (w1 > NEAR) | (w2 > NEAR))
    cut = (w0 <= NEAR) | (w1 <= NEAR) | (w2 <= NEAR)
    far0, far1, far2 = tl.maximum(w0, NEAR), tl.maximum(w1, NEAR), tl.maximum(w2, NEAR)
    left, width = _span(_across(x0, far0, size), _across(x1, far1, size), _across(x2, far2, size), seen, cut, size, MARGIN)
    top, height = _span(_down(y0, far0, size), _down(y1, far1, size), _down(y2, far2, size), seen, cut, size, MARGIN)
    count = width * height
    count = tl.where((count > SMALL) == LARGE, count, 0)
    lane = tl.arange(0, PIXELS)[None, :]
    step = tl.num_programs(2) * PIXELS
    for begin in range(tl.program_id(2) * PIXELS, tl.max(tl.max(count, 1), 0), step):
        pixel = begin + lane
        row = top + pixel // tl.maximum(width, 1)
        column = left + pixel % tl.maximum(width, 1)
        hit, depth = _hits(x0, y0, w0, x1, y1, w1, x2, y2, w2, row, column, size, NEAR)
        hit = hit & (pixel < count)
        key = (depth.to(tl.int32, bitcast=True).to(tl.int64) << 32) | face.to(tl.int64)
        at = nearest + (image * size + row) * size + column
        # A look before it spares most atomic operations; what it sees may be old, and is then larger.
        hit = hit & (key < tl.load(at, mask=hit, other=0))
        tl.atomic_min(at, key, mask=hit, sem="relaxed")


@triton.jit
def _corner(xyw, vertices, real):
    """Load x, y and w of one vertex of each face."""
    at = xyw + tl.load(vertices, mask=real, other=0) * 3
    return tl.load(at, mask=real, other=0.0), tl.load(at + 1, mask=real, other=0.0), tl.load(at + 2, mask=real, other=0.0)


@triton.jit
def _finite(x, y, w):
    return (x - x == 0) & (y - y == 0) & (w - w == 0)


@triton.jit
def _across(x, w, size):
    """Return in which column x / w is; whole numbers are the centres of pixels."""
    return (tl.div_rn(x, w) + 1.0) * (size * 0.5) - 0.5


@triton.jit
def _down(y, w, size):
    return (tl.div_rn(-y, w) + 1.0) * (size * 0.5) - 0.5


@triton.jit
def _span(a, b, c, seen, cut, size, MARGIN: tl.constexpr):
    """Return the first pixel and the number of pixels of boxes along an axis; see rasterization._span."""
    low = tl.minimum(tl.minimum(a, b), c) - MARGIN
    high = tl.maximum(tl.maximum(a, b), c) + MARGIN
    first = tl.ceil(tl.minimum(tl.maximum(low, 0.0), size * 1.0))
    last = tl.floor(tl.minimum(tl.maximum(high, -1.0), size - 1.0))
    first = tl.where(cut, 0.0, first)
    last = tl.where(cut, size - 1.0, last)
    count = tl.where(seen, tl.maximum(last - first + 1.0, 0.0), 0.0)
    return tl.where(seen, first, 0.0).to(tl.int32), count.to(tl.int32)


@triton.jit
def _hits(x0, y0, w0, x1, y1, w1, x2, y2, w2, row, column, size, NEAR: tl.constexpr):
    """Say whether pixels' centres hit their faces, and at which depths; see rasterization._hits."""
    centre_x = tl.div_rn((2 * column + (1 - size)).to(tl.float32), size * 1.0)
    centre_y = tl.div_rn(((size - 1) - 2 * row).to(tl.float32), size * 1.0)
    x0, y0 = x0 - centre_x * w0, y0 - centre_y * w0
    x1, y1 = x1 - centre_x * w1, y1 - centre_y * w1
    x2, y2 = x2 - centre_x * w2, y2 - centre_y * w2
    e0 = x1 * y2 - y1 * x2
    e1 = x2 * y0 - y2 * x0
    e2 = x0 * y1 - y0 * x1
    total = e0 + e1 + e2
    depth = tl.div_rn(e0 * w0 + e1 * w1 + e2 * w2, tl.where(total == 0, 1.0, total))
    inside = ((e0 >= 0) & (e1 >= 0) & (e2 >= 0)) | ((e0 <= 0) & (e1 <= 0) & (e2 <= 0))
    return inside & (total != 0) & (depth > NEAR), depth
