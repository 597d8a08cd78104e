"""compositing.py in Triton: a row of a block a ray, whose samples it goes along K at a time; nothing is added across rays."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_vsd.kernels.launch import launch
from dist_vsd.kernels.sampling import Samples

CONSTANTS = {"RAYS": 4, "K": 32}
# Of each kernel: the types of its arguments and its constants, for compilation without a GPU.
_RAYS = {"num_rays": "i32"}
_FIELD = dict.fromkeys(("density", "color", "delta", "t"), "*fp32") | {"first": "*i32"}
_COMPOSITED = dict.fromkeys(("weights", "transmittance", "color_out", "opacity_out", "depth_out"), "*fp32")
_PULLS = dict.fromkeys(("weights", "transmittance", "for_weights", "for_color", "for_opacity", "for_depth"), "*fp32")
_GRADIENTS = dict.fromkeys(("density_out", "color_out"), "*fp32")
_COUNTING = {"density": "*fp32", "delta": "*fp32", "first": "*i32", "counts": "*i32"}
SIGNATURES = {
    "forward_kernel": (_FIELD | _COMPOSITED | _RAYS, CONSTANTS),
    "backward_kernel": (_FIELD | _PULLS | _GRADIENTS | _RAYS, CONSTANTS),
    "visible_kernel": (_COUNTING | _RAYS | {"threshold": "fp32"}, CONSTANTS),
    "sum_kernel": ({"values": "*fp32", "first": "*i32", "sums": "*fp32"} | _RAYS, CONSTANTS),
}


def forward(density: Tensor, color: Tensor, samples: Samples) -> tuple[Tensor, ...]:
    """Return weights, transmittance, color, opacity and depth; see compositing.composite."""
    num_rays = samples.num_rays
    weights, transmittance = torch.zeros_like(density), torch.zeros_like(density)
    of_rays = density.new_empty(num_rays, 3), density.new_empty(num_rays), density.new_empty(num_rays)
    field = (density, color, samples.delta, samples.t, samples.first)
    launch(forward_kernel, _grid(num_rays), *field, weights, transmittance, *of_rays, num_rays, **CONSTANTS)
    return weights, transmittance, *of_rays


def backward(
    density: Tensor, color: Tensor, weights: Tensor, transmittance: Tensor, samples: Samples, *cotangents: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of density and color, given cotangents of weights, color, opacity and depth."""
    gradients = torch.zeros_like(density), torch.zeros_like(color)
    pulls = (weights, transmittance, *(cotangent.contiguous() for cotangent in cotangents))
    field = (density, color, samples.delta, samples.t, samples.first)
    launch(backward_kernel, _grid(samples.num_rays), *field, *pulls, *gradients, samples.num_rays, **CONSTANTS)
    return gradients


def count_visible(density: Tensor, delta: Tensor, first: Tensor, threshold: float) -> Tensor:
    """Return (N,) int32: how many samples of each ray, its first ones, have a transmittance above the threshold."""
    counts = torch.empty_like(first[1:])
    launch(visible_kernel, _grid(counts.numel()), density, delta, first, counts, counts.numel(), threshold, **CONSTANTS)
    return counts


def sum_along_rays(values: Tensor, first: Tensor) -> Tensor:
    """Return (N,) sums of (M,) values along each ray."""
    sums = values.new_empty(first.numel() - 1)
    launch(sum_kernel, _grid(sums.numel()), values, first, sums, sums.numel(), **CONSTANTS)
    return sums


def _grid(num_rays: int) -> tuple[int]:
    return (triton.cdiv(num_rays, CONSTANTS["RAYS"]),)


@triton.jit
def forward_kernel(
    density, color, delta, t, first, weights, transmittance, color_out, opacity_out, depth_out, num_rays,
    RAYS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Composite rays from near to far."""
    ray, real, start, end, longest = _segments(first, num_rays, RAYS)
    thickness = tl.full((RAYS,), 0.0, tl.float32)  # optical, of all in front of the next samples
    red, green, blue = thickness, thickness, thickness
    opacity, depth = thickness, thickness
    for k in range(0, longest, K):
        slot = start[:, None] + k + tl.arange(0, K)[None, :]
        inside = slot < end[:, None]
        light, thickness = _light(density, delta, slot, inside, start, thickness)
        tau = _product(density, delta, slot, inside)
        weight = light * _alpha(tau)
        tl.store(weights + slot, weight, mask=inside)
        tl.store(transmittance + slot, light, mask=inside)
        at = slot.to(tl.int64) * 3
        red += tl.sum(weight * tl.load(color + at, mask=inside, other=0.0), axis=1)
        green += tl.sum(weight * tl.load(color + at + 1, mask=inside, other=0.0), axis=1)
        blue += tl.sum(weight * tl.load(color + at + 2, mask=inside, other=0.0), axis=1)
        weight = tl.where(inside, weight, 0.0)
        opacity += tl.sum(weight, axis=1)
        depth += tl.sum(weight * tl.load(t + slot, mask=inside, other=0.0), axis=1)
    tl.store(color_out + ray * 3, red, mask=real)
    tl.store(color_out + ray * 3 + 1, green, mask=real)
    tl.store(color_out + ray * 3 + 2, blue, mask=real)
    tl.store(opacity_out + ray, opacity, mask=real)
    tl.store(depth_out + ray, depth, mask=real)


@triton.jit
def backward_kernel(
    density, color, delta, t, first, weights, transmittance, for_weights, for_color, for_opacity, for_depth,
    density_out, color_out, num_rays,
    RAYS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Carry cotangents to densities and colours, from far to near."""
    ray, real, start, end, longest = _segments(first, num_rays, RAYS)
    red = tl.load(for_color + ray * 3, mask=real, other=0.0)[:, None]
    green = tl.load(for_color + ray * 3 + 1, mask=real, other=0.0)[:, None]
    blue = tl.load(for_color + ray * 3 + 2, mask=real, other=0.0)[:, None]
    solid = tl.load(for_opacity + ray, mask=real, other=0.0)[:, None]
    far = tl.load(for_depth + ray, mask=real, other=0.0)[:, None]
    behind = tl.full((RAYS,), 0.0, tl.float32)  # sum of G w over what has been passed
    for block in range((longest + K - 1) // K):
        slot = start[:, None] + ((longest + K - 1) // K - 1 - block) * K + tl.arange(0, K)[None, :]
        inside = slot < end[:, None]
        pull = _pull(color, t, for_weights, slot, inside, red, green, blue, solid, far)
        # The next sample's G w instead of one's own, which would have to be taken away again.
        has_next = slot + 1 < end[:, None]
        next_pull = _pull(color, t, for_weights, slot + 1, has_next, red, green, blue, solid, far)
        shifted = next_pull * tl.load(weights + slot + 1, mask=has_next, other=0.0)
        rest = behind[:, None] + tl.cumsum(shifted, axis=1, reverse=True)
        behind += tl.sum(shifted, axis=1)
        light = tl.load(transmittance + slot, mask=inside, other=0.0)
        through = light * tl.exp(-_product(density, delta, slot, inside))
        length = tl.load(delta + slot, mask=inside, other=0.0)
        tl.store(density_out + slot, length * (pull * through - rest), mask=inside)
        weight = tl.load(weights + slot, mask=inside, other=0.0)
        at = slot.to(tl.int64) * 3
        tl.store(color_out + at, weight * red, mask=inside)
        tl.store(color_out + at + 1, weight * green, mask=inside)
        tl.store(color_out + at + 2, weight * blue, mask=inside)


@triton.jit
def visible_kernel(density, delta, first, counts, num_rays, threshold, RAYS: tl.constexpr, K: tl.constexpr):
    """Count each ray's samples that more light than the threshold gets away from."""
    ray, real, start, end, longest = _segments(first, num_rays, RAYS)
    thickness = tl.full((RAYS,), 0.0, tl.float32)
    count = tl.full((RAYS,), 0, tl.int32)
    for k in range(0, longest, K):
        slot = start[:, None] + k + tl.arange(0, K)[None, :]
        inside = slot < end[:, None]
        light, thickness = _light(density, delta, slot, inside, start, thickness)
        count += tl.sum((inside & (light > threshold)).to(tl.int32), axis=1)
    tl.store(counts + ray, count, mask=real)


@triton.jit
def sum_kernel(values, first, sums, num_rays, RAYS: tl.constexpr, K: tl.constexpr):
    """Sum values along each ray."""
    ray, real, start, end, longest = _segments(first, num_rays, RAYS)
    total = tl.full((RAYS,), 0.0, tl.float32)
    for k in range(0, longest, K):
        slot = start[:, None] + k + tl.arange(0, K)[None, :]
        total += tl.sum(tl.load(values + slot, mask=slot < end[:, None], other=0.0), axis=1)
    tl.store(sums + ray, total, mask=real)


@triton.jit
def _segments(first, num_rays, RAYS: tl.constexpr):
    """Return a block's rays, which of them exist, their first slots and ends, and the number of samples of the longest."""
    ray = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    real = ray < num_rays
    start = tl.load(first + ray, mask=real, other=0)
    end = tl.load(first + ray + 1, mask=real, other=0)
    return ray, real, start, end, tl.max(end - start, axis=0)


@triton.jit
def _product(density, delta, slot, inside):
    """Return sigma delta."""
    return tl.load(density + slot, mask=inside, other=0.0) * tl.load(delta + slot, mask=inside, other=0.0)


@triton.jit
def _light(density, delta, slot, inside, start, thickness):
    """Return T of K samples of each ray, and the optical thickness that is in front of the K after them but for the last of these."""
    # The sample before instead of one's own, which may be huge and would have to be taken away again.
    shifted = _product(density, delta, slot - 1, inside & (slot > start[:, None]))
    return tl.exp(-(thickness[:, None] + tl.cumsum(shifted, axis=1))), thickness + tl.sum(shifted, axis=1)


@triton.jit
def _alpha(tau):
    """Return 1 - exp(-tau), by its series where the difference would lose digits."""
    small = tl.minimum(tau, 0.03)
    series = small * (1.0 - small * 0.5 * (1.0 - small * 0.3333333333 * (1.0 - small * 0.25)))
    return tl.where(tau < 0.03, series, 1.0 - tl.exp(-tau))


@triton.jit
def _pull(color, t, for_weights, slot, inside, red, green, blue, solid, far):
    """Return G, the sum of what pulls at a weight."""
    at = slot.to(tl.int64) * 3
    pull = tl.load(for_weights + slot, mask=inside, other=0.0) + solid + far * tl.load(t + slot, mask=inside, other=0.0)
    pull += red * tl.load(color + at, mask=inside, other=0.0)
    pull += green * tl.load(color + at + 1, mask=inside, other=0.0)
    return pull + blue * tl.load(color + at + 2, mask=inside, other=0.0)
