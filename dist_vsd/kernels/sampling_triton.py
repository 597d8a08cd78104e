"""sampling.py in Triton: a lane a ray; one kernel counts its samples, another writes them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_vsd.kernels.box import FAR, PARALLEL
from dist_vsd.kernels.launch import launch
from dist_vsd.kernels.packing import segments, strides

CONSTANTS = {"BLOCK": 128, "FAR": FAR, "PARALLEL": PARALLEL}
# Of each kernel: the types of its arguments and its constants, for compilation without a GPU.
_RAYS = dict.fromkeys(("origins", "directions", "offsets"), "*fp32") | {"binaries": "*u1", "counts": "*i32"}
_SLOTS = {"stride": "*i32", "first": "*i32", "ray_out": "*i32", "t_out": "*fp32", "delta_out": "*fp32"}
_CUBE = {"num_rays": "i32", "num_samples": "i32", "resolution": "i32", "bound": "fp32", "scale": "fp32"}
SIGNATURES = {"count_kernel": (_RAYS | _CUBE, CONSTANTS), "write_kernel": (_RAYS | _SLOTS | _CUBE, CONSTANTS)}


def sample(
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
    """Return ray, t, delta and first; see sampling.sample_occupied."""
    num_rays, resolution = origins.shape[0], binaries.shape[0]
    grid = (triton.cdiv(num_rays, CONSTANTS["BLOCK"]),)
    cube = (num_rays, num_samples, resolution, bound, resolution / (2 * bound))
    counts = torch.empty(num_rays, device=origins.device, dtype=torch.int32)
    launch(count_kernel, grid, origins, directions, offset, binaries, counts, *cube, **CONSTANTS)
    stride = strides(counts, rays_per_image, budget, num_samples)
    first = segments((counts + stride - 1) // stride)
    capacity = int(first[-1]) if capacity is None else capacity  # CPU-GPU sync where there is no budget
    ray = torch.full((capacity,), max(0, num_rays - 1), device=origins.device, dtype=torch.int32)
    t, delta = origins.new_zeros(capacity), origins.new_zeros(capacity)
    launch(write_kernel, grid, origins, directions, offset, binaries, counts, stride, first, ray, t, delta, *cube, **CONSTANTS)
    return ray, t, delta, first


@triton.jit
def count_kernel(
    origins, directions, offsets, binaries, counts,
    num_rays, num_samples, resolution, bound, scale,
    BLOCK: tl.constexpr, FAR: tl.constexpr, PARALLEL: tl.constexpr,
):  # fmt: skip
    """Count each ray's samples in occupied cells."""
    ray = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = ray < num_rays
    ox, oy, oz, dx, dy, dz, near, step, shift = _way(
        origins, directions, offsets, ray, real, num_samples, bound, FAR, PARALLEL
    )
    count = tl.full((BLOCK,), 0, tl.int32)
    for i in range(num_samples):
        t = near + i * step + shift
        hit = _occupied(binaries, ox + t * dx, oy + t * dy, oz + t * dz, real & (step > 0), resolution, bound, scale)
        count += hit.to(tl.int32)
    tl.store(counts + ray, count, mask=real)


@triton.jit
def write_kernel(
    origins, directions, offsets, binaries, counts, stride, first, ray_out, t_out, delta_out,
    num_rays, num_samples, resolution, bound, scale,
    BLOCK: tl.constexpr, FAR: tl.constexpr, PARALLEL: tl.constexpr,
):  # fmt: skip
    """Write each ray's samples: of every ``stride`` in occupied cells the middle one."""
    ray = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = ray < num_rays
    ox, oy, oz, dx, dy, dz, near, step, shift = _way(
        origins, directions, offsets, ray, real, num_samples, bound, FAR, PARALLEL
    )
    count = tl.load(counts + ray, mask=real, other=0)
    every = tl.load(stride + ray, mask=real, other=1)
    begin = tl.load(first + ray, mask=real, other=0)
    group = tl.full((BLOCK,), 0, tl.int32)  # which of the ray's groups of samples is being gone through
    within = tl.full((BLOCK,), 0, tl.int32)  # and which sample of it comes next
    for i in range(num_samples):
        t = near + i * step + shift
        hit = _occupied(binaries, ox + t * dx, oy + t * dy, oz + t * dz, real & (step > 0), resolution, bound, scale)
        length = tl.minimum(every, count - group * every)
        kept = hit & (within == length // 2)
        tl.store(ray_out + begin + group, ray, mask=kept)
        tl.store(t_out + begin + group, t, mask=kept)
        tl.store(delta_out + begin + group, step * length.to(tl.float32), mask=kept)
        within += hit.to(tl.int32)
        full = within == every
        group += full.to(tl.int32)
        within = tl.where(full, 0, within)


@triton.jit
def _way(origins, directions, offsets, ray, real, num_samples, bound, FAR: tl.constexpr, PARALLEL: tl.constexpr):
    """Load rays; return them with where they enter the cube, the lengths of their intervals and how far on these are sampled."""
    ox, oy, oz = _row(origins, ray, real)
    dx, dy, dz = _row(directions, ray, real)
    near, step = _stretch(ox, oy, oz, dx, dy, dz, bound, num_samples, FAR, PARALLEL)
    return ox, oy, oz, dx, dy, dz, near, step, tl.load(offsets + ray, mask=real, other=0.0) * step


@triton.jit
def _row(rows, index, real):
    """Load the three numbers of a row of an (N, 3) tensor."""
    x = tl.load(rows + index * 3, mask=real, other=0.0)
    y = tl.load(rows + index * 3 + 1, mask=real, other=0.0)
    z = tl.load(rows + index * 3 + 2, mask=real, other=0.0)
    return x, y, z


@triton.jit
def _slab(origin, direction, bound, FAR: tl.constexpr, PARALLEL: tl.constexpr):
    """Return where a ray is between two opposite faces of the cube; see box.stretch."""
    parallel = tl.abs(direction) < PARALLEL
    inverse = tl.div_rn(1.0, tl.where(parallel, 1.0, direction))
    one = (-bound - origin) * inverse
    other = (bound - origin) * inverse
    between = tl.where(tl.abs(origin) <= bound, FAR, -FAR)
    return tl.where(parallel, -between, tl.minimum(one, other)), tl.where(parallel, between, tl.maximum(one, other))


@triton.jit
def _stretch(ox, oy, oz, dx, dy, dz, bound, num_samples, FAR: tl.constexpr, PARALLEL: tl.constexpr):
    """Return where rays enter the cube, and the lengths of their intervals; see box.stretch."""
    low_x, high_x = _slab(ox, dx, bound, FAR, PARALLEL)
    low_y, high_y = _slab(oy, dy, bound, FAR, PARALLEL)
    low_z, high_z = _slab(oz, dz, bound, FAR, PARALLEL)
    low = tl.maximum(tl.maximum(tl.maximum(low_x, low_y), low_z), 0.0)
    high = tl.minimum(tl.minimum(high_x, high_y), high_z)
    step = tl.div_rn(tl.maximum(high - low, 0.0), num_samples * 1.0)
    return tl.where(step > 0, low, 0.0), step


@triton.jit
def _cell(coordinate, resolution, bound, scale):
    """Return the index of a coordinate's cell along its axis; what is beyond the cube counts to its outermost cells."""
    cell = ((coordinate + bound) * scale).to(tl.int32)
    return tl.minimum(tl.maximum(cell, 0), resolution - 1)


@triton.jit
def _occupied(binaries, x, y, z, asked, resolution, bound, scale):
    """Say whether points' cells are occupied."""
    index = (_cell(x, resolution, bound, scale) * resolution + _cell(y, resolution, bound, scale)) * resolution
    return asked & (tl.load(binaries + index + _cell(z, resolution, bound, scale), mask=asked, other=0) != 0)
