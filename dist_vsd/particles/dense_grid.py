"""Multi-resolution dense grids: the encoding that is fast on a CPU."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_vsd.kernels import c_kernels
from dist_vsd.kernels.choice import serving
from dist_vsd.particles.particle_configs import DenseGridConfig

CORNERS = tuple(itertools.product((0, 1), repeat=3))


class DenseGrid(nn.Module):
    """Encode points by trilinear interpolation in several dense grids.

    Args:
        config: resolutions and features.
        generator: draws the start, U(-1e-2, 1e-2), on the CPU.
    """

    def __init__(self, config: DenseGridConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.levels = nn.ParameterList(
            nn.Parameter((torch.rand(1, config.num_features, r, r, r, generator=generator) * 2 - 1) * 1e-2)
            for r in config.resolutions
        )
        self.num_outputs = config.num_features * len(config.resolutions)
        self.finest_resolution = max(config.resolutions)

    def forward(self, points: Tensor) -> Tensor:
        """Encode (N, 3) points in [-1, 1]^3 as (N, num_outputs) features; the gradient flows to the grids alone."""
        if points.device.type == "cpu":
            return _Interpolation.apply(points, *self.levels)
        grid = points.flip(-1).reshape(1, 1, 1, -1, 3)  # grid_sample wants the last axis of the volume first
        rows = [nn.functional.grid_sample(v, grid, align_corners=True, padding_mode="border").reshape(v.shape[1], -1) for v in self.levels]
        return torch.cat(rows).T


class _Interpolation(torch.autograd.Function):
    """The same on a CPU: by a kernel in C, or else as a product with a sparse matrix of 8 weights a point and level.

    torch's grid_sample() goes through a grid feature by feature, and back also computes the gradient of the points, asked for or not.
    Here a vertex's features lie next to each other and go together: 2 to 3 times as fast, to rounding the same.
    """

    @staticmethod
    def forward(ctx: Any, points: Tensor, *levels: Tensor) -> Tensor:
        num_features = levels[0].shape[1]
        ctx.shapes = [level.shape for level in levels]
        ctx.by = serving(points, *levels) if num_features <= c_kernels.MOST_FEATURES else "torch"
        table = torch.cat([level.reshape(num_features, -1).T for level in levels])
        if ctx.by == "c":
            points, resolutions = points.contiguous(), torch.tensor([level.shape[-1] for level in levels])
            ctx.save_for_backward(points, resolutions)
            return c_kernels.encode(points, table, resolutions)
        vertices, weights = interpolation_weights(points, [level.shape[-1] for level in levels])
        ctx.save_for_backward(vertices, weights)
        encoded = nn.functional.embedding_bag(vertices, table, mode="sum", per_sample_weights=weights)
        return encoded.reshape(len(points), len(levels) * num_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        num_features, sizes = ctx.shapes[0][1], [shape[2:].numel() for shape in ctx.shapes]
        if ctx.by == "c":
            points, resolutions = ctx.saved_tensors
            gradient = c_kernels.encode_backward(points, cotangent.contiguous(), resolutions, torch.Size((sum(sizes), num_features)))
        else:
            gradient = _transposed_product(*ctx.saved_tensors, cotangent.reshape(-1, num_features), sum(sizes))
        parts = zip(gradient.split(sizes), ctx.shapes, strict=True)
        return None, *(part.T.reshape(shape) for part, shape in parts)


def _transposed_product(vertices: Tensor, weights: Tensor, cotangent: Tensor, num_vertices: int) -> Tensor:
    begins = np.arange(0, vertices.numel() + 1, len(CORNERS), dtype=np.int32)
    matrix = csr_matrix((weights.numpy().reshape(-1), vertices.numpy().reshape(-1), begins), shape=(len(vertices), num_vertices))
    return torch.from_numpy(matrix.T @ cotangent.numpy())


def interpolation_weights(points: Tensor, resolutions: list[int]) -> tuple[Tensor, Tensor]:
    """Return where trilinear interpolation reads, and how much of it.

    Args:
        points: (N, 3) in [-1, 1]^3, whose corners are vertices; what lies outside is taken to the border.
        resolutions: vertices a side of each level.

    Returns:
        For each point, level after level: (N * levels, 8) int32 rows of the levels' vertices, laid out one level after the other,
        and their weights.
    """
    shape = (len(resolutions), len(CORNERS), len(points))
    vertices, weights = points.new_empty(shape, dtype=torch.int32), points.new_empty(shape)
    unit, first = (points.T + 1) / 2, 0
    for level, resolution in enumerate(resolutions):
        place = (unit * (resolution - 1)).clamp_(0, resolution - 1)
        cell = place.int().clamp_(0, resolution - 2)  # a NaN, too, is given a cell
        x, y, z = zip(1 - (place - cell), place - cell, strict=True)
        begin = ((cell[0] * resolution).add_(cell[1]) * resolution).add_(cell[2]).add_(first)
        for corner, (i, j, k) in enumerate(CORNERS):
            torch.mul(x[i] * y[j], z[k], out=weights[level, corner])
            torch.add(begin, (i * resolution + j) * resolution + k, out=vertices[level, corner])
        first += resolution**3
    return tuple(rows.permute(2, 0, 1).reshape(-1, len(CORNERS)) for rows in (vertices, weights))
