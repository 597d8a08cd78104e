"""Volume rendering of a radiance field, skipping empty space; compositing is nerfacc's (Li et al. 2023).

Two ways to choose samples end in the same functions. Stratified samples are laid on every ray, and only those in occupied cells are
evaluated: plain torch, on any device. On CUDA, where somebody has compiled nerfacc's own kernels, it marches through its occupancy grid
instead; no current torch compiles them (nerfacc 0.5.3 clashes with C++20's std::lerp), so most GPUs have none.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable

import nerfacc
import torch
from torch import Tensor

Field = Callable[[Tensor], tuple[Tensor, Tensor]]  # (N, 3) points -> (N,) densities, (N, 3) colours


@dataclasses.dataclass(frozen=True)
class Rays:
    """N rays composited.

    Attributes:
        color: (N, 3) premultiplied by opacity, without a background.
        opacity: (N,) in [0, 1].
        weights: (M,) of the points at which the field was asked.
        depth: (M,) of these points along their rays, scene units.
        ray: (M,) index of the ray of each.
        num_samples: on a ray through the whole cube, before those in empty cells are skipped.
    """

    color: Tensor
    opacity: Tensor
    weights: Tensor
    depth: Tensor
    ray: Tensor
    num_samples: int

    @property
    def num_evaluated(self) -> int:
        """Points at which the field was asked."""
        return self.weights.numel()

    def opacity_entropy(self) -> Tensor:
        """Return the mean binary entropy of the rays' opacity, nats: a pixel should be solid or empty."""
        return _binary_entropy(self.opacity).mean()

    def weight_entropy(self) -> Tensor:
        """Return the mean binary entropy of the samples' compositing weights, bits: a sample should be all of its ray's colour or none.

        This is what thu-ml/prolificdreamer weighs by 10 (by 100 against fog): H(w) = -w log2 w - (1 - w) log2(1 - w) with w clamped to
        [1e-5, 1 - 1e-5], its mean over all samples of all rays, of which it evaluates all (64 and 32 more on each; its README's
        command uses no occupancy grid). So samples that are skipped here, in empty cells, count in the mean, with 0 bits (theirs with
        H(1e-5) = 1.8e-4, which has no gradient), and num_samples stands for the 96 whatever the length of a ray in the cube.
        threestudio has no such term: its ``opaque`` is on the opacity, in nats, as opacity_entropy().
        """
        return _binary_entropy(self.weights).sum() / (math.log(2) * self.opacity.numel() * self.num_samples)

    def depth_variance(self) -> Tensor:
        """Return the mean, over rays that are more than half opaque, of the variance of depth along a ray, scene units squared.

        The z-variance of HiFA (Zhu et al. 2023): it is small where a ray meets one thin surface.
        """
        opacity = self.opacity.clamp_min(1e-5)
        weights = self.weights / opacity[self.ray]
        mean = self.opacity.new_zeros(self.opacity.shape).index_add(0, self.ray, weights * self.depth)
        spread = weights * (self.depth - mean[self.ray]).square()
        variance = self.opacity.new_zeros(self.opacity.shape).index_add(0, self.ray, spread)
        solid = (self.opacity.detach() > 0.5).to(variance)
        return (variance * solid).sum() / solid.sum().clamp_min(1.0)


@functools.cache
def has_marching_kernels() -> bool:
    """Say whether nerfacc's CUDA kernels are there as a compiled module; it would otherwise call a compiler at the first render."""
    return importlib.util.find_spec("nerfacc.csrc") is not None


def box_interval(origins: Tensor, directions: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Intersect rays with the cube [-bound, bound]^3.

    Args:
        origins, directions: (N, 3).
        bound: half the cube's side.

    Returns:
        (N,) entry and exit distances; equal where a ray misses the cube.
    """
    inverse = 1.0 / torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
    low, high = (-bound - origins) * inverse, (bound - origins) * inverse
    near = torch.minimum(low, high).amax(-1).clamp_min(0.0)
    far = torch.maximum(low, high).amin(-1)
    return near, torch.maximum(near, far)


def occupied(points: Tensor, estimator: nerfacc.OccGridEstimator, bound: float) -> Tensor:
    """Return a boolean for each of (..., 3) points: whether its cell of the occupancy grid is occupied."""
    resolution = estimator.resolution.tolist()
    scale = points.new_tensor([r / (2 * bound) for r in resolution])
    cell = ((points + bound) * scale).long().clamp_(min=0)
    cell = torch.minimum(cell, cell.new_tensor(resolution) - 1)
    index = (cell[..., 0] * resolution[1] + cell[..., 1]) * resolution[2] + cell[..., 2]
    return estimator.binaries.reshape(-1)[index]


def render_stratified(
    field: Field,
    estimator: nerfacc.OccGridEstimator,
    origins: Tensor,
    directions: Tensor,
    bound: float,
    num_samples: int,
    offset: Tensor,
) -> Rays:
    """Render with evenly spaced samples in the cube, shifted on each ray by ``offset``; works on any device.

    Args:
        field: asked only at points in occupied cells.
        estimator: the occupancy grid.
        origins, directions: (N, 3); directions of unit length.
        bound: half the cube's side.
        num_samples: samples on each ray.
        offset: (N,) in [0, 1), in units of a step; 0.5 is the middle of each interval.
    """
    near, far = box_interval(origins, directions, bound)
    step = ((far - near) / num_samples)[:, None]
    edges = torch.arange(num_samples, device=origins.device, dtype=origins.dtype)
    t_starts = near[:, None] + edges * step
    t_ends = t_starts + step
    t = t_starts + offset[:, None] * step
    points = origins[:, None] + t[..., None] * directions[:, None]
    active = (occupied(points, estimator, bound) & (step > 0)).reshape(-1).nonzero().squeeze(-1)
    density, color = field(points.reshape(-1, 3)[active])
    densities = density.new_zeros(t.numel()).index_put((active,), density).view_as(t)
    weights, _, _ = nerfacc.render_weight_from_density(t_starts, t_ends, densities)
    return _accumulate(weights.reshape(-1)[active], color, t.reshape(-1)[active], active // num_samples, origins.shape[0], num_samples)


def render_marched(
    field: Field,
    estimator: nerfacc.OccGridEstimator,
    origins: Tensor,
    directions: Tensor,
    bound: float,
    num_samples: int,
    offset: Tensor,
) -> Rays:
    """Render by nerfacc's marching through the occupancy grid (CUDA alone); arguments as render_stratified's.

    nerfacc's own jitter would come from the global generator: each ray starts ``offset`` steps later instead.
    """
    step = 2 * bound * 3**0.5 / num_samples
    with torch.no_grad():
        ray, t_starts, t_ends = estimator.sampling(
            origins.contiguous(), directions.contiguous(), render_step_size=step, t_min=offset * step
        )
    t = (t_starts + t_ends) / 2
    points = origins[ray] + t[:, None] * directions[ray]
    density, color = field(points)
    weights, _, _ = nerfacc.render_weight_from_density(t_starts, t_ends, density, ray_indices=ray, n_rays=origins.shape[0])
    return _accumulate(weights, color, t, ray, origins.shape[0], num_samples)


def _binary_entropy(probability: Tensor) -> Tensor:
    """Return -p ln p - (1 - p) ln(1 - p) of each, nats; p is kept 1e-5 away from 0 and 1, beyond which there is no gradient."""
    p = probability.clamp(1e-5, 1 - 1e-5)
    return -(p * p.log() + (1 - p) * (1 - p).log())


def _accumulate(weights: Tensor, color: Tensor, depth: Tensor, ray: Tensor, num_rays: int, num_samples: int) -> Rays:
    accumulated = nerfacc.accumulate_along_rays(weights, color, ray_indices=ray, n_rays=num_rays)
    opacity = nerfacc.accumulate_along_rays(weights, None, ray_indices=ray, n_rays=num_rays)
    return Rays(accumulated, opacity.squeeze(-1), weights, depth, ray, num_samples)
