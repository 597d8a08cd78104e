"""Refreshing an occupancy grid: which cells of the cube hold nothing worth a sample (Instant-NGP, appendix C; nerfacc's grid)."""

from __future__ import annotations

from collections.abc import Callable

import nerfacc
import torch
from torch import Tensor, nn

DECAY = 0.95  # of what a cell is known to hold, each refresh (nerfacc's)
CHUNK_CELLS = 1 << 18
# Steps of the sequence of places in a cell: 1/g, 1/g^2 and 1/g^3, where g^4 = g + 1 (Roberts 2018, "R_3"): any few of them lie far apart.
PLACE_STEPS = (0.8191725133961645, 0.6710436067037893, 0.5497004779019703)


def make_grid(bound: float, resolution: int) -> nerfacc.OccGridEstimator:
    """Make a grid over [-bound, bound]^3, of which nothing is known to be empty yet."""
    grid = nerfacc.OccGridEstimator([-bound] * 3 + [bound] * 3, resolution=resolution)
    grid.binaries.fill_(True)
    # nerfacc keeps the coordinates of all cells, 32 bytes each: they are made where they are needed.
    grid.grid_coords, grid.grid_indices = grid.grid_coords[:0], grid.grid_indices[:0]
    return grid


@torch.no_grad()
def refresh(
    grid: nerfacc.OccGridEstimator, density: Callable[[Tensor], Tensor], bound: float, step: float, number: int, most: float
) -> None:
    """Look at every cell once, and mark those that are empty and have empty neighbours only.

    nerfacc's own update with two differences. It waits for the device, as it selects cells by booleans; here all cells are looked at,
    always, which costs less than a hundredth of the renders between two refreshes. And it draws a place in each cell; here all cells are
    looked at in the same place, which moves on from refresh to refresh, so that nothing is drawn: the grid depends on the field alone.

    Args:
        grid: changed in place.
        density: of (M, 3) points, 1 / scene units.
        bound: half the side of the cube.
        step: length that a sample stands for, scene units.
        number: of the refresh.
        most: opacity of a sample at which a cell is not empty, or less: the mean over all cells, if that is below.
    """
    place = [(0.5 + number * part) % 1.0 for part in PLACE_STEPS]
    resolution, device = grid.binaries.shape[-1], grid.occs.device
    axes = [(torch.arange(resolution, device=device, dtype=grid.occs.dtype) + part) * (2 * bound / resolution) - bound for part in place]
    planes = max(1, CHUNK_CELLS // resolution**2)
    seen = [
        density(torch.stack(torch.meshgrid(x, *axes[1:], indexing="ij"), -1).reshape(-1, 3)) for x in axes[0].split(planes)
    ]
    grid.occs.copy_(torch.maximum(grid.occs * DECAY, torch.cat(seen) * step))
    occupied = (grid.occs > grid.occs.mean().clamp(max=most)).view_as(grid.binaries)
    # Widen by a cell: a part that begins to grow outwards must not be cut off until the next refresh.
    grid.binaries.copy_(nn.functional.max_pool3d(occupied.float()[None], 3, stride=1, padding=1)[0] > 0)
