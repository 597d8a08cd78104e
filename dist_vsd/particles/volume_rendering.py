"""Volume rendering of a radiance field, skipping empty space and what opaque surfaces hide.

Samples are laid evenly on each ray, kept where their cell is occupied, and packed (kernels/sampling.py); the field is asked at them, tile
by tile if memory asks for it; and they are composited (kernels/compositing.py). The kernels' number of slots is fixed by a budget, so that
on an accelerator nothing waits for it; on a CPU, which has nothing to wait for, there are as many slots as samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dist_vsd.kernels.compositing import accumulate, composite, visible
from dist_vsd.kernels.sampling import Samples, sample_occupied

Density = Callable[[Tensor], Tensor]  # (M, 3) points -> (M,) densities, 1 / scene units
LEAST_SLOPE = 1e-2  # of density, 1 / scene units squared, below which there is no surface: the start's ball has 10 at its edge
LEAST_OPACITY = 1e-5  # of a ray whose mean distance means something
Field = Callable[[Tensor], tuple[Tensor, Tensor]]  # (M, 3) points -> (M,) densities, (M, 3) colours


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Where rays are sampled, and how many samples are held.

    Attributes:
        bound: half the side of the cube that holds the field, scene units.
        num_samples: intervals of a ray's way through the cube.
        samples_per_ray: samples that the rays of an image have on average at most; an image that would have more is thinned evenly
            (kernels/sampling.py). 0: no limit.
        visible_per_ray: likewise, of those that are not hidden; 0: as samples_per_ray.
        hidden_below: share of light from a sample to the eye below which it is hidden, and asked without a gradient alone; 0: none is.
        tile_points: points whose activations are held at once: the field is asked tile by tile, and asked again in the backward pass.
            0: all are held.
    """

    bound: float
    num_samples: int
    samples_per_ray: int = 0
    visible_per_ray: int = 0
    hidden_below: float = 0.0
    tile_points: int = 0

    def budget(self, rays_per_image: int, per_ray: int, device: torch.device) -> int | None:
        """Return the slots of an image; None where there is no limit and nobody has to wait for the number."""
        if not per_ray and device.type == "cpu":
            return None
        return rays_per_image * min(per_ray or self.num_samples, self.num_samples)


@dataclasses.dataclass(frozen=True)
class Rays:
    """N rays composited.

    Attributes:
        color: (N, 3) premultiplied by opacity, without a background.
        opacity: (N,) in [0, 1].
        weights: (M,) of the samples at which the field was asked; 0 in slots that are left over.
        samples: where these are.
        distance: (N,) expected distance to what is hit, along the ray from its origin, scene units; 0 where nothing is.
    """

    color: Tensor
    opacity: Tensor
    weights: Tensor
    samples: Samples
    distance: Tensor

    @property
    def num_evaluated(self) -> int:
        """Samples at which the field was asked with a gradient (a CPU-GPU sync)."""
        return int(self.samples.count)

    def normals(self, density: Density, origins: Tensor, directions: Tensor, step: float, sampling: Sampling) -> Tensor:
        """Return (N, 3) surface normals along the axes of the world, composited as colours are: premultiplied by opacity.

        The field is asked six times anew at each sample that this render asked it at; the gradient flows to it and to the weights.

        Args:
            density: of the field.
            origins, directions: (N, 3), with which the rays were rendered.
            step: see outward_normals.
            sampling: with which the rays were rendered.
        """
        points = self.samples.points(origins, directions)
        normals = outward_normals(lambda at: in_tiles(density, at, sampling.tile_points), points, step, sampling.bound)
        return torch.stack([accumulate(self.weights * along, self.samples) for along in normals.unbind(-1)], -1)

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
        bits = torch.where(self.samples.filled(), _binary_entropy(self.weights), 0).sum() / math.log(2)
        return bits / (self.opacity.numel() * self.samples.num_samples)

    def depth_variance(self) -> Tensor:
        """Return the mean, over rays that are more than half opaque, of the variance of depth along a ray, scene units squared.

        The z-variance of HiFA (Zhu et al. 2023): it is small where a ray meets one thin surface.
        """
        ray, t = self.samples.ray, self.samples.t
        weights = self.weights / self.opacity.clamp_min(LEAST_OPACITY)[ray]
        mean = accumulate(weights * t, self.samples)
        variance = accumulate(weights * (t - mean[ray]).square(), self.samples)
        solid = (self.opacity.detach() > 0.5).to(variance)
        return (variance * solid).sum() / solid.sum().clamp_min(1.0)


def cells_of(points: Tensor, binaries: Tensor, bound: float) -> Tensor:
    """Return a boolean for each of (..., 3) points: whether its cell of (R, R, R) binaries is occupied."""
    resolution = binaries.shape[-1]
    x, y, z = ((points + bound) * (resolution / (2 * bound))).long().clamp_(0, resolution - 1).unbind(-1)
    return binaries.reshape(-1)[(x * resolution + y) * resolution + z]


def render_rays(
    field: Field,
    density: Density,
    binaries: Tensor,
    origins: Tensor,
    directions: Tensor,
    offset: Tensor,
    rays_per_image: int,
    sampling: Sampling,
) -> Rays:
    """Render rays with evenly spaced samples in the cube, shifted on each ray by ``offset``.

    Args:
        field: asked at samples in occupied cells alone.
        density: the same field's, where colours do not matter.
        binaries: (R, R, R) booleans, the cells that are not empty.
        origins, directions: (N, 3); directions of unit length.
        offset: (N,) in [0, 1), in units of a step; 0.5 is the middle of each interval.
        rays_per_image: rays that share a budget.
        sampling: how many samples there are.
    """
    device = origins.device
    budget = sampling.budget(rays_per_image, sampling.samples_per_ray, device)
    samples = sample_occupied(origins, directions, offset, binaries, sampling.bound, sampling.num_samples, rays_per_image, budget)
    if sampling.hidden_below > 0:
        with torch.no_grad():
            densities = in_tiles(density, samples.points(origins, directions), sampling.tile_points)
        budget = sampling.budget(rays_per_image, sampling.visible_per_ray or sampling.samples_per_ray, device)
        samples = visible(densities, samples, budget, sampling.hidden_below)
    densities, colors = in_tiles(field, samples.points(origins, directions), sampling.tile_points)
    composited = composite(densities, colors, samples)
    distance = composited.depth / composited.opacity.clamp_min(LEAST_OPACITY)
    return Rays(composited.color, composited.opacity, composited.weights, samples, distance)


def outward_normals(density: Density, points: Tensor, step: float, bound: float) -> Tensor:
    """Return (M, 3) normals -grad sigma / |grad sigma|, by central differences; shorter than 1 where density hardly changes.

    Differentiable in the field's parameters, which autograd's own gradient by the points would not be: kernels have it once.

    Args:
        density: the field's.
        points: (M, 3).
        step: half the difference's length, scene units.
        bound: half the side of the cube beyond which the field is not asked.
    """
    falls = []
    for axis in torch.eye(3, dtype=points.dtype, device=points.device).mul(step):
        before, behind = ((points + shift).clamp(-bound, bound) for shift in (-axis, axis))
        falls.append((density(before) - density(behind)) / (2 * step))
    fall = torch.stack(falls, -1)
    return fall / (fall.square().sum(-1, keepdim=True) + LEAST_SLOPE**2).sqrt()


def in_tiles(field: Callable[[Tensor], Tensor | tuple[Tensor, ...]], points: Tensor, size: int) -> Tensor | tuple[Tensor, ...]:
    """Ask a field at (M, 3) points, ``size`` of them at a time (0: at once).

    Of each tile nothing but the result is kept: in the backward pass it is asked again. The memory of one tile for the time of two
    passes; the numbers are the same, and the gradient of the field's parameters to the rounding of its sum over tiles.
    """
    if size == 0 or points.shape[0] <= size:
        return field(points)
    parts = [checkpoint(field, tile, use_reentrant=False, preserve_rng_state=False) for tile in points.split(size)]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def _binary_entropy(probability: Tensor) -> Tensor:
    """Return -p ln p - (1 - p) ln(1 - p) of each, nats; p is kept 1e-5 away from 0 and 1, beyond which there is no gradient."""
    p = probability.clamp(1e-5, 1 - 1e-5)
    return -(p * p.log() + (1 - p) * (1 - p).log())
