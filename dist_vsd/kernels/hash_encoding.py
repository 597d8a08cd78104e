"""The multi-resolution hash encoding of Instant-NGP (Mueller et al. 2022, section 3): features at points, and the tables' gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_vsd.kernels.choice import serving

# Instant-NGP, equation 4: the first coordinate is not multiplied, for coherence of memory accesses.
PRIMES = (1, 2_654_435_761, 805_459_861)


def hash_encode(points: Tensor, tables: Sequence[Tensor], resolutions: Sequence[int], count: Tensor | None = None) -> Tensor:
    """Encode points by trilinear interpolation of the features of L levels' vertices.

    A level with R cells a side keeps its (R + 1)^3 vertices one to one where its table has as many entries; elsewhere vertices share the
    entries of a table, at (x xor y 2654435761 xor z 805459861) mod size.

    Differentiable in the tables alone. For backward only the points are kept, 12 bytes each; indices and weights are computed again.
    In Triton the gradient is summed by atomic additions, in no fixed order: in torch's deterministic mode
    (torch.use_deterministic_algorithms) plain torch serves instead.

    Args:
        points: (M, 3); those beyond [-1, 1]^3 count as the nearest point of its border.
        tables: L of (size, F), F alike; sizes of hashed levels are powers of two.
        resolutions: L, cells a side.
        count: () integer on the device, of the points that matter, the first ones; the rows of the others are 0 and they have no
            gradient. None: all of them.

    Returns:
        (M, L F), level after level.

    Raises:
        ValueError: a hashed level's size is not a power of two.
    """
    for table, resolution in zip(tables, resolutions, strict=True):
        size = table.shape[0]
        if not is_dense(resolution, size) and size & (size - 1):
            raise ValueError(f"a hashed level's entries must be a power of two, got {size} for {resolution} cells: change the table's size")
    in_triton = serving(points, *tables) == "triton" and not torch.are_deterministic_algorithms_enabled()
    return _HashEncoding.apply(points, count, tuple(resolutions), in_triton, *tables)


def is_dense(resolution: int, size: int) -> bool:
    """Say whether each vertex of a level has an entry of its own."""
    return (resolution + 1) ** 3 <= size


def vertex_index(x: Tensor, y: Tensor, z: Tensor, resolution: int, size: int) -> Tensor:
    """Return the table's entries of vertices, int64, given their integer coordinates in shapes that broadcast."""
    if is_dense(resolution, size):
        return (z * (resolution + 1) + y) * (resolution + 1) + x
    return (x ^ (y * PRIMES[1]) ^ (z * PRIMES[2])) & (size - 1)  # % size, which is a power of two


class _HashEncoding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, points: Tensor, count: Tensor | None, resolutions: tuple[int, ...], in_triton: bool, *tables: Tensor) -> Tensor:
        ctx.save_for_backward(points, count)
        ctx.resolutions, ctx.in_triton, ctx.sizes = resolutions, in_triton, [table.shape[0] for table in tables]
        if in_triton:
            from dist_vsd.kernels.hash_encoding_triton import encode

            return encode(points.contiguous(), tables, resolutions, count)
        features = [_features(points, table, resolution) for table, resolution in zip(tables, resolutions, strict=True)]
        return _counted(torch.cat(features, -1), count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        points, count = ctx.saved_tensors
        if ctx.in_triton:
            from dist_vsd.kernels.hash_encoding_triton import gradients

            return None, None, None, None, *gradients(points.contiguous(), cotangent, ctx.sizes, ctx.resolutions, count)
        levels = _counted(cotangent, count).chunk(len(ctx.sizes), -1)
        rows = zip(levels, ctx.resolutions, ctx.sizes, strict=True)
        return None, None, None, None, *[_gradient(points, level, resolution, size) for level, resolution, size in rows]


def _counted(rows: Tensor, count: Tensor | None) -> Tensor:
    """Return rows with 0 in those that do not count."""
    if count is None:
        return rows
    return torch.where((torch.arange(rows.shape[0], device=rows.device) < count)[:, None], rows, 0)


def _corners(points: Tensor, resolution: int, size: int) -> tuple[Tensor, Tensor]:
    """Return (M, 8) entries and (M, 8) weights of the corners of the cells around points; x changes first."""
    scaled = ((points + 1) / 2).clamp(0.0, 1.0) * resolution
    lower = scaled.floor().clamp(max=resolution - 1)
    fraction = scaled - lower
    vertex = torch.stack([lower, lower + 1], -1).long()  # (M, 3, 2)
    weight = torch.stack([1 - fraction, fraction], -1)
    index = vertex_index(vertex[:, 0, None, None, :], vertex[:, 1, None, :, None], vertex[:, 2, :, None, None], resolution, size)
    product = weight[:, 0, None, None, :] * weight[:, 1, None, :, None] * weight[:, 2, :, None, None]
    return index.reshape(-1, 8), product.reshape(-1, 8)


def _features(points: Tensor, table: Tensor, resolution: int) -> Tensor:
    index, weight = _corners(points, resolution, table.shape[0])
    return (weight[..., None] * table[index]).sum(1)


def _gradient(points: Tensor, cotangent: Tensor, resolution: int, size: int) -> Tensor:
    index, weight = _corners(points, resolution, size)
    rows = (weight[..., None] * cotangent[:, None]).flatten(0, 1)
    return rows.new_zeros(size, rows.shape[-1]).index_add_(0, index.flatten(), rows)
