"""silhouettes.py in Triton: a lane a pair of neighbouring pixels."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dist_vsd.kernels.launch import launch

CONSTANTS = {"BLOCK": 128}
# Of the kernel: the types of its arguments and its constants, for compilation without a GPU.
_MESH = {"xyw": "*fp32", "faces": "*i64", "across": "*i64", "is_turned": "*u1"}
_PIXELS = {"face": "*i64", "depth": "*fp32", "found": "*i64"}
_SIZES = {"num_pairs": "i32", "num_vertices": "i32", "size": "i32", "near": "fp32", "num_steps": "i32"}
SIGNATURES = {"cross_kernel": (_MESH | _PIXELS | _SIZES, CONSTANTS)}


def crossing_edges(
    xyw: Tensor, faces: Tensor, across: Tensor, is_turned: Tensor, face: Tensor, depth: Tensor, near: float, num_steps: int
) -> Tensor:
    """Return (2, B, size, size) int64 silhouettes between neighbouring pixels; see silhouettes.crossing_edges."""
    found = face.new_empty(2, *face.shape)
    arguments = (xyw, faces, across, is_turned, face, depth, found, found.numel(), xyw.shape[1], face.shape[1], near, num_steps)
    launch(cross_kernel, (triton.cdiv(found.numel(), CONSTANTS["BLOCK"]),), *arguments, **CONSTANTS)
    return found


@triton.jit
def cross_kernel(
    xyw, faces, across, is_turned, face, depth, found, num_pairs, num_vertices, size, near, num_steps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Follow the way from each pair's nearer pixel to the other one until a silhouette, or the other pixel's centre."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    half = num_pairs // 2
    down = pair >= half
    pixel = tl.where(down, pair - half, pair)
    row, column = pixel // size % size, pixel % size
    going = (pair < num_pairs) & (tl.where(down, row, column) < size - 1)
    beside = pixel + tl.where(down, size, 1)
    this = tl.load(face + pixel, mask=going, other=-1)
    that = tl.load(face + beside, mask=going, other=-1)
    farther = tl.load(depth + beside, mask=going, other=0.0) < tl.load(depth + pixel, mask=going, other=0.0)
    other = (this < 0) | ((that >= 0) & farther)
    going = going & (this != that)
    at = tl.where(going, tl.where(other, that, this), 0).to(tl.int32)
    row += (other & down).to(tl.int32)
    column += (other & (down == 0)).to(tl.int32)
    centre_x = tl.div_rn((2 * column + (1 - size)).to(tl.float32), size * 1.0)
    centre_y = tl.div_rn(((size - 1) - 2 * row).to(tl.float32), size * 1.0)
    sign = tl.where(other == down, 1.0, -1.0)
    first = xyw + (pixel // (size * size)).to(tl.int64) * num_vertices * 3
    edge = tl.full((BLOCK,), -1, tl.int32)
    left = num_steps * tl.max(going.to(tl.int32), 0)
    while left > 0:
        along, leaving, fits, facing, whole = _way_out(first, faces, at, going, centre_x, centre_y, down, sign, size, near)
        going = going & (along <= 1.0) & whole
        through = at.to(tl.int64) * 3 + leaving
        following = tl.load(across + through, mask=going, other=-1).to(tl.int32)
        turned = tl.load(is_turned + through, mask=going, other=0) != 0
        beyond = _facing(first, faces, following, going & (following >= 0))
        end = going & ((following < 0) | (facing * beyond * tl.where(turned, -1.0, 1.0) < 0))
        edge = tl.where(end & fits, at * 6 + leaving * 2 + other.to(tl.int32), edge)
        going = going & (end == 0)
        at = tl.where(going, following, at)
        left = (left - 1) * tl.max(going.to(tl.int32), 0)
    tl.store(found + pair, edge.to(tl.int64), mask=pair < num_pairs)


@triton.jit
def _corner(first, vertices, real):
    """Load x, y and w of one vertex of each face."""
    at = first + tl.load(vertices, mask=real, other=0) * 3
    return tl.load(at, mask=real, other=0.0), tl.load(at + 1, mask=real, other=0.0), tl.load(at + 2, mask=real, other=0.0)


@triton.jit
def _sign(x0, y0, w0, x1, y1, w1, x2, y2, w2):
    """Return 1, -1 or 0: whether vertices go around counter-clockwise, clockwise, or in a line."""
    det = (x1 * y2 - y1 * x2) * w0 + (x2 * y0 - y2 * x0) * w1 + (x0 * y1 - y0 * x1) * w2
    return tl.where(det > 0, 1.0, tl.where(det < 0, -1.0, 0.0))


@triton.jit
def _facing(first, faces, face, real):
    vertices = faces + face.to(tl.int64) * 3
    x0, y0, w0 = _corner(first, vertices, real)
    x1, y1, w1 = _corner(first, vertices + 1, real)
    x2, y2, w2 = _corner(first, vertices + 2, real)
    return _sign(x0, y0, w0, x1, y1, w1, x2, y2, w2)


@triton.jit
def _way_out(first, faces, face, real, centre_x, centre_y, down, sign, size, near):
    """Return silhouettes._exit of faces, which way they face, and whether they are wholly before the camera."""
    vertices = faces + face.to(tl.int64) * 3
    x0, y0, w0 = _corner(first, vertices, real)
    x1, y1, w1 = _corner(first, vertices + 1, real)
    x2, y2, w2 = _corner(first, vertices + 2, real)
    facing = _sign(x0, y0, w0, x1, y1, w1, x2, y2, w2)
    whole = (w0 > near) & (w1 > near) & (w2 > near)
    x0, y0 = x0 - centre_x * w0, y0 - centre_y * w0
    x1, y1 = x1 - centre_x * w1, y1 - centre_y * w1
    x2, y2 = x2 - centre_x * w2, y2 - centre_y * w2
    u0, v0 = tl.where(down, y0, x0) * sign, tl.where(down, x0, y0)
    u1, v1 = tl.where(down, y1, x1) * sign, tl.where(down, x1, y1)
    u2, v2 = tl.where(down, y2, x2) * sign, tl.where(down, x2, y2)
    along, fits = _crossing(u1, v1, w1, u2, v2, w2, down, size)
    place1, fits1 = _crossing(u2, v2, w2, u0, v0, w0, down, size)
    place2, fits2 = _crossing(u0, v0, w0, u1, v1, w1, down, size)
    leaving = tl.where(place1 > along, 1, 0)
    fits = tl.where(place1 > along, fits1, fits)
    along = tl.where(place1 > along, place1, along)
    leaving = tl.where(place2 > along, 2, leaving)
    fits = tl.where(place2 > along, fits2, fits)
    along = tl.where(place2 > along, place2, along)
    return tl.where(along == float("-inf"), float("inf"), along), leaving, fits, facing, whole


@triton.jit
def _crossing(u0, v0, w0, u1, v1, w1, down, size):
    """Return where an edge crosses the way, minus infinity where it does not, and whether it is steep enough for this direction."""
    long = w0 * u1 - w1 * u0
    wide = w0 * v1 - w1 * v0
    place = tl.div_rn(u0 * v1 - v0 * u1, tl.where(wide == 0, 1.0, wide)) * (size * 0.5)
    fits = (tl.abs(wide) > tl.abs(long)) | ((down == 0) & (tl.abs(wide) == tl.abs(long)))
    return tl.where((v0 >= 0) != (v1 >= 0), place, float("-inf")), fits
