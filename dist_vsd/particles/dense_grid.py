"""Multi-resolution dense grids: the encoding that is fast on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_vsd.particles.particle_configs import DenseGridConfig


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
        grid = points.flip(-1).reshape(1, 1, 1, -1, 3)  # grid_sample wants the last axis of the volume first
        rows = [nn.functional.grid_sample(v, grid, align_corners=True, padding_mode="border").reshape(v.shape[1], -1) for v in self.levels]
        return torch.cat(rows).T
