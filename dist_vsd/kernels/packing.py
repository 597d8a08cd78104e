"""Packing into a fixed number of slots: nothing here makes the CPU wait for a device, unless the exact number is asked for."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(mask: Tensor, capacity: int | None) -> Tensor:
    """Return the indices of True entries, in order.

    Args:
        mask: (L,) booleans.
        capacity: slots; None takes as many as there are entries, which waits for the device.

    Returns:
        (capacity,) int64. What does not fit is left out; slots that stay empty hold L, one past the last index.
    """
    if capacity is None:
        return mask.nonzero().squeeze(-1)  # CPU-GPU sync
    # The k-th entry is the first at which k have been counted: a search instead of a scatter, so no two writes meet.
    counted = mask.cumsum(0, dtype=torch.int32)
    return torch.searchsorted(counted, torch.arange(1, capacity + 1, device=mask.device, dtype=torch.int32))


def strides(counts: Tensor, rays_per_image: int, budget: int | None, num_samples: int) -> Tensor:
    """Return how many samples of a ray become one, so that every image fits into its budget.

    The smallest power of two s with sum over an image's rays of ceil(count / s) <= budget. It depends on the image alone, not on those
    that are rendered beside it. An s exists, as one sample a ray always fits.

    Args:
        counts: (N,) samples of each ray, at most ``num_samples``.
        rays_per_image: rays that share a budget.
        budget: samples of an image, at least ``rays_per_image``; None for no limit.
        num_samples: see counts.

    Returns:
        (N,) int32, contiguous, the same on all rays of an image.
    """
    if budget is None:
        return torch.ones_like(counts, dtype=torch.int32)
    check_budget(counts.numel(), rays_per_image, budget)
    exponent = torch.arange((num_samples - 1).bit_length(), device=counts.device, dtype=torch.int32)[:, None, None]
    per_image = counts.reshape(-1, rays_per_image)
    too_many = ((per_image + (1 << exponent) - 1) >> exponent).sum(-1) > budget
    stride = 1 << too_many.sum(0, dtype=torch.int32)  # totals fall with s: as many are too large as come before the first that fits
    return stride[:, None].expand_as(per_image).contiguous().reshape(-1)


def check_budget(num_rays: int, rays_per_image: int, budget: int) -> None:
    """Refuse a budget that one sample a ray could exceed, and rays that are not whole images.

    Raises:
        ValueError: naming the rule, the value and the remedy.
    """
    if num_rays % rays_per_image:
        raise ValueError(f"rays must be whole images of rays_per_image={rays_per_image}, got {num_rays}: change rays_per_image")
    if budget < rays_per_image:
        raise ValueError(f"the budget must be at least one sample a ray, {rays_per_image} an image, got {budget}: raise the budget")


def segments(counts: Tensor) -> Tensor:
    """Return (N + 1,) int32: where each ray's samples begin when (N,) counts of them are packed one after the other, and the end."""
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
