"""Volume rendering of packed samples: emission and absorption along rays (Max 1995; Mildenhall et al. 2020, equation 3)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_vsd.kernels import c_kernels
from dist_vsd.kernels.choice import serving
from dist_vsd.kernels.packing import check_budget, segments, strides
from dist_vsd.kernels.sampling import Samples


@dataclasses.dataclass(frozen=True)
class Composited:
    """N rays composited from M slots of samples; all of it differentiable but the transmittance.

    Attributes:
        weights: (M,) w = T alpha, in [0, 1]; 0 in left over slots.
        transmittance: (M,) T, of light on its way from a sample to the eye; 0 in left over slots.
        color: (N, 3) sum of w color: premultiplied by opacity, without a background.
        opacity: (N,) sum of w, in [0, 1].
        depth: (N,) sum of w t, scene units: to be divided by opacity where a mean is meant.
    """

    weights: Tensor
    transmittance: Tensor
    color: Tensor
    opacity: Tensor
    depth: Tensor


def composite(density: Tensor, color: Tensor, samples: Samples) -> Composited:
    """Composite the samples of each ray from near to far.

    alpha_i = 1 - exp(-sigma_i delta_i), T_i = exp(-sum of sigma_j delta_j over j < i), w_i = T_i alpha_i, as nerfacc's
    render_weight_from_density. Differentiable in density and color, once; weights may have cotangents of their own:

        dL/dsigma_k = delta_k (G_k T_{k+1} - sum of G_i w_i over i > k),      dL/dcolor_k = w_k dL/dcolor,

    where G_i is the sum of what pulls at w_i. Sums go along a ray in a fixed order, so both directions give the same bits again, whatever
    is rendered beside it. Nothing waits for the device.

    Args:
        density: (M,) sigma, 0 or more, in 1 / scene units; half precision is taken to fp32.
        color: (M, 3).
        samples: of M slots, N rays.
    """
    density, color = (value.float() if value.dtype in (torch.float16, torch.bfloat16) else value for value in (density, color))
    return Composited(*_Compositing.apply(density, color, samples, serving(density, color, samples.t)))


def accumulate(values: Tensor, samples: Samples) -> Tensor:
    """Return (N,) sums of (M,) values along each ray, in a fixed order; differentiable."""
    return _Accumulation.apply(values, samples, serving(values, samples.t))


@torch.no_grad()
def visible(density: Tensor, samples: Samples, budget: int | None, threshold: float = 1e-4) -> Samples:
    """Leave out the samples behind opaque surfaces: those that less than ``threshold`` of their light gets away from.

    Given the densities of a pass without a gradient, these need not be asked in the pass that has one: together they have less than
    ``threshold`` of their ray's weight. What is left is packed anew. An image that exceeds its budget even so is thinned as in
    sample_occupied. Not differentiable.

    Args:
        density: (M,) at the samples.
        samples: of M slots.
        budget: samples of an image, at least rays_per_image; None for as many as there are, which waits for the device.
        threshold: of transmittance T.

    Raises:
        ValueError: the budget is below one sample a ray.
    """
    num_rays, device = samples.num_rays, samples.t.device
    if budget is not None:
        check_budget(num_rays, samples.rays_per_image, budget)
    if serving(density, samples.t) == "triton":
        from dist_vsd.kernels.compositing_triton import count_visible

        counts = count_visible(density.contiguous(), samples.delta, samples.first, threshold)
    else:
        counts = _along_rays(_transmittance(density, samples) > threshold, samples).sum(1, dtype=torch.int32)
    # Transmittance falls along a ray: what is visible is the first part of its segment.
    stride = strides(counts, samples.rays_per_image, budget, samples.num_samples)
    first = segments((counts + stride - 1) // stride)
    capacity = int(first[-1]) if budget is None else num_rays // samples.rays_per_image * budget  # CPU-GPU sync where there is no budget
    slot = torch.arange(capacity, device=device, dtype=torch.int32)
    ray = torch.searchsorted(first[1:], slot, right=True).clamp_(max=max(0, num_rays - 1))
    filled = slot < first[-1]
    begin = (slot - first[ray]) * stride[ray]  # of the group of samples that become one, on its ray
    length = torch.minimum(stride[ray], counts[ray] - begin)
    source = torch.where(filled, samples.first[ray] + begin + length // 2, 0)
    t, delta = (torch.where(filled, values, 0) for values in (samples.t[source], samples.delta[source] * length))
    return Samples(ray.int(), t, delta, first, samples.num_samples, samples.rays_per_image)


class _Compositing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, density: Tensor, color: Tensor, samples: Samples, by: str) -> tuple[Tensor, ...]:
        if by == "triton":
            from dist_vsd.kernels.compositing_triton import forward
        else:
            forward = _forward_in_c if by == "c" else _forward
        density, color = density.contiguous(), color.contiguous()
        weights, transmittance, *of_rays = forward(density, color, samples)
        ctx.save_for_backward(density, color, weights, transmittance)
        ctx.samples, ctx.by = samples, by
        ctx.mark_non_differentiable(transmittance)
        return weights, transmittance, *of_rays

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.by == "triton":
            from dist_vsd.kernels.compositing_triton import backward
        else:
            backward = _backward_in_c if ctx.by == "c" else _backward
        for_weights, _, *for_rays = cotangents
        return *backward(*ctx.saved_tensors, ctx.samples, for_weights, *for_rays), None, None


class _Accumulation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, samples: Samples, by: str) -> Tensor:
        ctx.samples = samples
        if by == "triton":
            from dist_vsd.kernels.compositing_triton import sum_along_rays

            return sum_along_rays(values.contiguous(), samples.first)
        return _summed(values, samples)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return torch.where(ctx.samples.filled(), cotangent[ctx.samples.ray], 0), None, None


def _forward_in_c(density: Tensor, color: Tensor, samples: Samples) -> tuple[Tensor, ...]:
    return c_kernels.composite(density, color, samples.t, samples.delta, samples.first)


def _backward_in_c(
    density: Tensor, color: Tensor, weights: Tensor, transmittance: Tensor, samples: Samples, *cotangents: Tensor
) -> tuple[Tensor, Tensor]:
    of_samples = (samples.t, samples.delta, samples.first)
    return c_kernels.composite_backward(density, color, *of_samples, weights, transmittance, *cotangents)


def _forward(density: Tensor, color: Tensor, samples: Samples) -> tuple[Tensor, ...]:
    """Return weights, transmittance, color, opacity and depth, in plain torch."""
    transmittance = _transmittance(density, samples)
    weights = transmittance * -torch.expm1(-density * samples.delta)
    sums = _summed(torch.cat([color, torch.ones_like(color[:, :1]), samples.t[:, None]], 1) * weights[:, None], samples)
    return weights, transmittance, sums[:, :3].contiguous(), sums[:, 3].contiguous(), sums[:, 4].contiguous()


def _backward(
    density: Tensor,
    color: Tensor,
    weights: Tensor,
    transmittance: Tensor,
    samples: Samples,
    for_weights: Tensor,
    for_color: Tensor,
    for_opacity: Tensor,
    for_depth: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of density and color, in plain torch."""
    pull = for_weights + (for_color[samples.ray] * color).sum(-1) + for_opacity[samples.ray] + for_depth[samples.ray] * samples.t
    behind = _along_rays(pull * weights, samples).flip(1)
    behind = _packed(_before(behind).flip(1), samples)
    through = transmittance * torch.exp(-density * samples.delta)
    return samples.delta * (pull * through - behind), weights[:, None] * for_color[samples.ray]


def _transmittance(density: Tensor, samples: Samples) -> Tensor:
    """Return (M,) T; 0 in left over slots."""
    return _packed(torch.exp(-_before(_along_rays(density * samples.delta, samples))), samples)


def _before(values: Tensor) -> Tensor:
    """Return sums of what comes before, along rows: one's own is not added and taken away again, as it may be huge."""
    sums = torch.nn.functional.pad(values[:, :-1], (1, 0))
    if not torch.are_deterministic_algorithms_enabled() or values.device.type == "cpu":
        return sums.cumsum(1)
    # torch refuses a cumsum of floats on CUDA in its deterministic mode; sums of 2, of 4, of 8 columns are as good.
    for exponent in range((sums.shape[1] - 1).bit_length()):
        sums = sums + torch.nn.functional.pad(sums[:, : -(2**exponent)], (2**exponent, 0))
    return sums


def _along_rays(values: Tensor, samples: Samples) -> Tensor:
    """Lay (M,) values out in one row a ray, with 0 behind its last sample: (N, num_samples), or as wide as the longest on a CPU."""
    if values.device.type == "cpu":
        return values.new_zeros(samples.in_rows.shape).masked_scatter_(samples.in_rows, values)
    slot = samples.first[:-1, None] + torch.arange(samples.num_samples, device=values.device, dtype=torch.int32)
    if not values.numel():
        return values.new_zeros(slot.shape)
    inside = slot < samples.first[1:, None]
    return torch.where(inside, values[slot.clamp_(max=values.numel() - 1)], 0)


def _packed(rows: Tensor, samples: Samples) -> Tensor:
    """Take the (M,) values of samples out of rows of _along_rays; 0 in left over slots."""
    if rows.device.type == "cpu":
        values = rows.masked_select(samples.in_rows)
        return torch.nn.functional.pad(values, (0, samples.t.shape[0] - values.shape[0]))
    slot = torch.arange(samples.t.shape[0], device=rows.device, dtype=torch.int32)
    column = (slot - samples.first[samples.ray]).clamp_(max=samples.num_samples - 1)
    return torch.where(samples.filled(), rows[samples.ray, column], 0)


def _summed(values: Tensor, samples: Samples) -> Tensor:
    """Return (N, ...) sums of (M, ...) values along rays, one after the other."""
    return torch.segment_reduce(values, "sum", offsets=samples.first.long(), axis=0, unsafe=True)  # unsafe: offsets are not looked at
