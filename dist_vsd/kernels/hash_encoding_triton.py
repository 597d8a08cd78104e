"""hash_encoding.py in Triton: a lane a point, all levels in one launch, level after level so that one level's table stays in the cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_vsd.kernels.launch import launch

BLOCK = 128
CONSTANTS = {"F": 2, "F_PADDED": 2, "HAS_COUNT": True, "BLOCK": BLOCK}
# Of each kernel: the types of its arguments and its constants, for compilation without a GPU.
_TABLES = {"levels": "*i64", "count": "*i32", "num_points": "i32"}
SIGNATURES = {
    "encode_kernel": ({"points": "*fp32", "tables": "*fp32", "out": "*fp32"} | _TABLES, CONSTANTS),
    "gradient_kernel": (
        {"points": "*fp32", "gradient": "*fp32", "cotangent": "*fp32"} | _TABLES | {"row_stride": "i64", "column_stride": "i64"},
        CONSTANTS,
    ),
}


def encode(points: Tensor, tables: Sequence[Tensor], resolutions: tuple[int, ...], count: Tensor | None) -> Tensor:
    """Return (M, L F) features: a transposed view, as points are written side by side, feature after feature."""
    num_features, sizes = tables[0].shape[1], tuple(table.shape[0] for table in tables)
    out = points.new_empty(len(tables) * num_features, points.shape[0])
    levels = _levels(resolutions, sizes, points.device)
    grid = (triton.cdiv(points.shape[0], BLOCK), len(tables))
    launch(encode_kernel, grid, points, torch.cat(list(tables)), levels, out, *_counted(points, count), **_constants(num_features, count))
    return out.T


def gradients(
    points: Tensor, cotangent: Tensor, sizes: Sequence[int], resolutions: tuple[int, ...], count: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the gradients of L tables, given the (M, L F) cotangent of their features."""
    num_features = cotangent.shape[1] // len(sizes)
    gradient = points.new_zeros(sum(sizes), num_features)
    levels = _levels(resolutions, tuple(sizes), points.device)
    grid = (triton.cdiv(points.shape[0], BLOCK), len(sizes))
    arguments = (points, gradient, levels, cotangent, *_counted(points, count), *cotangent.stride())
    launch(gradient_kernel, grid, *arguments, **_constants(num_features, count))
    return gradient.split(list(sizes))


def _counted(points: Tensor, count: Tensor | None) -> tuple[Tensor, int]:
    """Return the count, or a tensor in its place, and M."""
    return points if count is None else count, points.shape[0]


def _constants(num_features: int, count: Tensor | None) -> dict[str, int]:
    return {"F": num_features, "F_PADDED": triton.next_power_of_2(num_features), "HAS_COUNT": count is not None, "BLOCK": BLOCK}


@functools.lru_cache(maxsize=16)
def _levels(resolutions: tuple[int, ...], sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return (L, 3) int64 on the device, copied there once: each level's resolution, its size, and its first entry among all levels'."""
    first = [sum(sizes[:level]) for level in range(len(sizes))]
    return torch.tensor(list(zip(resolutions, sizes, first, strict=True))).to(device)


@triton.jit
def encode_kernel(
    points, tables, levels, out, count, num_points,
    F: tl.constexpr, F_PADDED: tl.constexpr, HAS_COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Interpolate the features of one level at a block of points."""
    level = tl.program_id(1)
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = point < num_points
    counted = real
    if HAS_COUNT:
        counted = real & (point < tl.load(count))
    feature = tl.arange(0, F_PADDED)[None, :]
    total = tl.full((BLOCK, F_PADDED), 0.0, tl.float32)
    x, fx, y, fy, z, fz, resolution, size, first = _cell(points, levels, level, point, counted)
    for corner in tl.static_range(8):
        entry, weight = _corner(corner, x, fx, y, fy, z, fz, resolution, size)
        row = (first + entry.to(tl.int64))[:, None]
        total += weight[:, None] * tl.load(tables + row * F + feature, mask=counted[:, None] & (feature < F), other=0.0)
    column = (level * F + feature).to(tl.int64)
    tl.store(out + column * num_points + point[:, None], total, mask=real[:, None] & (feature < F))


@triton.jit
def gradient_kernel(
    points, gradient, levels, cotangent, count, num_points, row_stride, column_stride,
    F: tl.constexpr, F_PADDED: tl.constexpr, HAS_COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the gradient of one level's entries from a block of points."""
    level = tl.program_id(1)
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counted = point < num_points
    if HAS_COUNT:
        counted = counted & (point < tl.load(count))
    feature = tl.arange(0, F_PADDED)[None, :]
    wanted = counted[:, None] & (feature < F)
    at = point.to(tl.int64)[:, None] * row_stride + (level * F + feature) * column_stride
    pull = tl.load(cotangent + at, mask=wanted, other=0.0)
    x, fx, y, fy, z, fz, resolution, size, first = _cell(points, levels, level, point, counted)
    for corner in tl.static_range(8):
        entry, weight = _corner(corner, x, fx, y, fy, z, fz, resolution, size)
        row = (first + entry.to(tl.int64))[:, None]
        tl.atomic_add(gradient + row * F + feature, weight[:, None] * pull, mask=wanted, sem="relaxed")


@triton.jit
def _cell(points, levels, level, point, counted):
    """Return the lower vertex of points' cells and where in the cell they are, along each axis, and what there is to know of the level."""
    resolution = tl.load(levels + level * 3).to(tl.int32)
    size = tl.load(levels + level * 3 + 1).to(tl.uint32)
    first = tl.load(levels + level * 3 + 2)
    x, fx = _vertex(points + point * 3, counted, resolution)
    y, fy = _vertex(points + point * 3 + 1, counted, resolution)
    z, fz = _vertex(points + point * 3 + 2, counted, resolution)
    return x, fx, y, fy, z, fz, resolution.to(tl.uint32), size, first


@triton.jit
def _vertex(coordinates, counted, resolution):
    """Return the lower vertex of a coordinate, and the fraction of a cell from there."""
    unit = (tl.load(coordinates, mask=counted, other=0.0) + 1.0) * 0.5
    scaled = tl.minimum(tl.maximum(unit, 0.0), 1.0) * resolution.to(tl.float32)
    lower = tl.minimum(scaled.to(tl.int32), resolution - 1)  # not below 0: truncation is the floor
    return lower.to(tl.uint32), scaled - lower.to(tl.float32)


@triton.jit
def _corner(corner: tl.constexpr, x, fx, y, fy, z, fz, resolution, size):
    """Return the entry and the weight of one corner of the cells; x is bit 0 of its number, y bit 1, z bit 2."""
    x_high: tl.constexpr = corner & 1
    y_high: tl.constexpr = (corner >> 1) & 1
    z_high: tl.constexpr = corner >> 2
    x, y, z = x + x_high, y + y_high, z + z_high
    side = resolution + 1
    # In 32 bits: what overflows are multiples of 2^32, and so of a hashed level's size; of a dense one's indices none overflows.
    hashed = (x ^ (y * 2654435761) ^ (z * 805459861)) & (size - 1)
    dense = (z * side + y) * side + x
    is_dense = side.to(tl.int64) * side * side <= size
    weight = (fx if x_high else 1.0 - fx) * (fy if y_high else 1.0 - fy) * (fz if z_high else 1.0 - fz)
    return tl.where(is_dense, dense, hashed), weight
