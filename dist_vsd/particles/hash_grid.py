"""The multi-resolution hash grid of Instant-NGP (Mueller et al. 2022, section 3): the encoding for 512 pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dist_vsd.kernels.hash_encoding import hash_encode
from dist_vsd.particles.particle_configs import HashGridConfig


def level_resolutions(config: HashGridConfig) -> list[int]:
    """Return the cells a side of every level: floor(N_min b^l) (Instant-NGP, equations 2 and 3)."""
    steps = max(1, config.num_levels - 1)
    growth = math.exp((math.log(config.finest_resolution) - math.log(config.base_resolution)) / steps)
    # The small offset keeps an exact power from falling to the integer below.
    return [math.floor(config.base_resolution * growth**level + 1e-6) for level in range(config.num_levels)]


class HashGrid(nn.Module):
    """Encode points by trilinear interpolation of hashed features.

    Args:
        config: sizes.
        generator: draws the start, U(-1e-4, 1e-4), on the CPU.
    """

    def __init__(self, config: HashGridConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.resolutions = level_resolutions(config)
        sizes = [min(2**config.log2_table_size, (r + 1) ** 3) for r in self.resolutions]
        self.tables = nn.ParameterList(
            nn.Parameter((torch.rand(size, config.num_features, generator=generator) * 2 - 1) * 1e-4) for size in sizes
        )
        self.num_outputs = config.num_levels * config.num_features
        self.finest_resolution = self.resolutions[-1]

    def forward(self, points: Tensor, count: Tensor | None = None) -> Tensor:
        """Encode (N, 3) points in [-1, 1]^3 as (N, num_outputs) features; the gradient flows to the tables alone.

        Args:
            points: (N, 3).
            count: see hash_encode.
        """
        return hash_encode(points, list(self.tables), self.resolutions, count)
