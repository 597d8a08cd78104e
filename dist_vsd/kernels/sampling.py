"""Samples along rays in occupied cells alone, packed ray after ray into a fixed number of slots, so that nothing waits for the device."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from dist_vsd.kernels import c_kernels
from dist_vsd.kernels.box import stretch
from dist_vsd.kernels.choice import serving
from dist_vsd.kernels.packing import check_budget, pack, segments, strides


@dataclasses.dataclass(frozen=True)
class Samples:
    """M slots with the samples of N rays, ray after ray, from near to far; the slots that are left over are at the end.

    Attributes:
        ray: (M,) int32, the ray of each sample. Left over slots name the last ray: an index that exists, beside a delta of 0, with which
            they have no weight and no gradient whatever a field says there.
        t: (M,) distances from the rays' origins, scene units; 0 in left over slots.
        delta: (M,) lengths that the samples stand for, scene units; 0 in left over slots.
        first: (N + 1,) int32: ray r's samples are in slots first[r] to first[r + 1] - 1.
        num_samples: the most that one ray may have, known without a look at the device.
        rays_per_image: rays that share a budget.
    """

    ray: Tensor
    t: Tensor
    delta: Tensor
    first: Tensor
    num_samples: int
    rays_per_image: int

    @property
    def num_rays(self) -> int:
        """N."""
        return self.first.shape[0] - 1

    @property
    def count(self) -> Tensor:
        """() int32 on the device: slots that hold samples."""
        return self.first[-1]

    def filled(self) -> Tensor:
        """Return (M,) booleans: which slots hold samples."""
        return torch.arange(self.t.shape[0], device=self.t.device) < self.count

    @functools.cached_property
    def in_rows(self) -> Tensor:
        """(N, K) booleans, on a CPU alone: which places of a row for each ray its samples fill; K is the longest ray's number of them."""
        counts = self.first.diff()
        width = int(counts.max()) if counts.numel() else 0
        return torch.arange(width, dtype=torch.int32) < counts[:, None]

    def points(self, origins: Tensor, directions: Tensor) -> Tensor:
        """Return (M, 3): where the samples are, given (N, 3) origins and directions; left over slots are at the last ray's origin."""
        if serving(origins, directions) == "c" and not (origins.requires_grad or directions.requires_grad):
            return c_kernels.points(origins.contiguous(), directions.contiguous(), self.ray, self.t)
        return origins[self.ray] + self.t[:, None] * directions[self.ray]


@torch.no_grad()
def sample_occupied(
    origins: Tensor,
    directions: Tensor,
    offset: Tensor,
    binaries: Tensor,
    bound: float,
    num_samples: int,
    rays_per_image: int,
    budget: int | None,
) -> Samples:
    """Lay evenly spaced samples on each ray's way through the cube, and keep those in occupied cells.

    The way from near to far is cut into ``num_samples`` intervals of length step; interval i is sampled at near + i step + offset step
    and kept if that point's cell is occupied. An image that would have more samples than its budget is thinned: on each of its rays s
    kept samples in a row become one, the middle one, that stands for s times the length (the last of a ray for as many as are left);
    s is the smallest power of two with which the image fits. That depends on nothing but the image.

    In Triton's kernels, in C where there is no budget, and in plain torch, with the same result. Not differentiable.

    Args:
        origins, directions: (N, 3); directions of unit length.
        offset: (N,) in [0, 1), in units of a step; 0.5 is the middle of each interval.
        binaries: (R, R, R) booleans: which cells of the cube are occupied.
        bound: the cube is [-bound, bound]^3.
        num_samples: intervals of a ray.
        rays_per_image: N is a multiple of it.
        budget: samples of an image, at least rays_per_image; None for as many as there are, which waits for the device.

    Returns:
        Samples with M = N / rays_per_image * budget slots, or exactly as many as there are samples.

    Raises:
        ValueError: the budget is below one sample a ray, or rays are not whole images.
    """
    if budget is not None:
        check_budget(origins.shape[0], rays_per_image, budget)
    by = serving(origins, directions, offset)
    rays, binaries = (origins.contiguous(), directions.contiguous(), offset.contiguous()), binaries.contiguous()
    if by == "c" and budget is None:
        near, step = stretch(origins, directions, bound, num_samples)
        found = c_kernels.sample(*rays, near.contiguous(), step.contiguous(), binaries, bound, num_samples)
        return Samples(*found, num_samples, rays_per_image)
    if by == "triton":
        from dist_vsd.kernels.sampling_triton import sample
    else:
        sample = _sample
    capacity = None if budget is None else origins.shape[0] // rays_per_image * budget
    ray, t, delta, first = sample(*rays, binaries, bound, num_samples, rays_per_image, budget, capacity)
    return Samples(ray, t, delta, first, num_samples, rays_per_image)


def _sample(
    origins: Tensor,
    directions: Tensor,
    offset: Tensor,
    binaries: Tensor,
    bound: float,
    num_samples: int,
    rays_per_image: int,
    budget: int | None,
    capacity: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ray, t, delta and first, in plain torch."""
    near, step = stretch(origins, directions, bound, num_samples)
    intervals = torch.arange(num_samples, device=origins.device, dtype=origins.dtype)
    t = near[:, None] + intervals * step[:, None] + (offset * step)[:, None]
    hit = _occupied(origins, directions, t, binaries, bound) & (step > 0)[:, None]
    if budget is None and capacity is None:  # every sample is kept by itself
        count = hit.sum(1, dtype=torch.int32)
        ray = torch.arange(len(hit), device=hit.device, dtype=torch.int32).repeat_interleave(count)  # CPU-GPU sync
        return ray, t[hit], step[ray], segments(count)
    ordinal = hit.cumsum(1, dtype=torch.int32) - 1
    count = ordinal[:, -1] + 1
    stride = strides(count, rays_per_image, budget, num_samples)
    begin = ordinal - ordinal % stride[:, None]
    length = torch.minimum(stride[:, None], count[:, None] - begin)
    kept = (hit & (ordinal - begin == length // 2)).reshape(-1)
    first = segments((count + stride - 1) // stride)
    index = pack(kept, capacity)
    ray = (index // num_samples).clamp_(max=max(0, origins.shape[0] - 1))
    filled = index < kept.numel()
    at = index.clamp(max=max(0, kept.numel() - 1))
    delta = torch.where(filled, step[ray] * length.reshape(-1)[at], 0)
    return ray.int(), torch.where(filled, t.reshape(-1)[at], 0), delta, first


def _occupied(origins: Tensor, directions: Tensor, t: Tensor, binaries: Tensor, bound: float) -> Tensor:
    """Return (N, K) booleans: whether the cells of the points at (N, K) distances are occupied."""
    resolution = binaries.shape[0]
    index = torch.zeros_like(t, dtype=torch.int32)
    for axis in range(3):
        point = (t * directions[:, axis, None]).add_(origins[:, axis, None])
        cell = point.add_(bound).mul_(resolution / (2 * bound)).int().clamp_(0, resolution - 1)
        index.mul_(resolution).add_(cell)
    return binaries.reshape(-1)[index]
