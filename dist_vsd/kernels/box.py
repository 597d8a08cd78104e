"""Where rays are inside the cube."""

from __future__ import annotations

import torch
from torch import Tensor

FAR = 1e30  # a distance that no ray gets to
PARALLEL = 1e-9  # a direction's component that is smaller does not cross the faces of that axis


def stretch(origins: Tensor, directions: Tensor, bound: float, num_samples: int) -> tuple[Tensor, Tensor]:
    """Cut the ways of (N, 3) rays through the cube [-bound, bound]^3 into intervals.

    Returns:
        (N,) distances at which rays enter the cube, and (N,) lengths of an interval; 0 and 0 for rays that miss it.
    """
    parallel = directions.abs() < PARALLEL
    inverse = 1.0 / torch.where(parallel, 1.0, directions)
    one, other = (-bound - origins) * inverse, (bound - origins) * inverse
    # Between two faces all the way, or never: so a ray may lie in a face.
    between = torch.where(origins.abs() <= bound, FAR, -FAR)
    low = torch.where(parallel, -between, torch.minimum(one, other)).amax(-1).clamp_min(0.0)
    high = torch.where(parallel, between, torch.maximum(one, other)).amin(-1)
    step = (high - low).clamp_min(0.0) / num_samples
    return torch.where(step > 0, low, 0), step
