"""The multi-resolution hash grid of Instant-NGP (Mueller et al. 2022, section 3), in plain torch: the encoding for 512 pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dist_vsd.particles.particle_configs import HashGridConfig

# Instant-NGP, equation 4: the first coordinate is not multiplied, for coherence of memory accesses.
PRIMES = (1, 2_654_435_761, 805_459_861)


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
        corners = torch.tensor([[(i >> axis) & 1 for axis in range(3)] for i in range(8)])
        self.register_buffer("corners", corners, persistent=False)

    def vertex_index(self, vertices: Tensor, resolution: int, size: int) -> Tensor:
        """Map integer (..., 3) vertices to table entries: one to one where the table is large enough, hashed elsewhere."""
        if (resolution + 1) ** 3 <= size:
            return (vertices[..., 2] * (resolution + 1) + vertices[..., 1]) * (resolution + 1) + vertices[..., 0]
        x, y, z = (vertices * vertices.new_tensor(PRIMES)).unbind(-1)
        return (x ^ y ^ z) % size

    def forward(self, points: Tensor) -> Tensor:
        """Encode (N, 3) points in [-1, 1]^3 as (N, num_outputs) features; the gradient flows to the tables alone."""
        unit = ((points + 1) / 2).clamp(0.0, 1.0)
        features = []
        for resolution, table in zip(self.resolutions, self.tables, strict=True):
            scaled = unit * resolution
            lower = scaled.floor().clamp(max=resolution - 1)
            fraction = (scaled - lower)[:, None]
            weight = torch.where(self.corners.bool(), fraction, 1 - fraction).prod(-1)
            index = self.vertex_index(lower.long()[:, None] + self.corners, resolution, table.shape[0])
            features.append((weight[..., None] * table[index]).sum(1))
        return torch.cat(features, -1)
