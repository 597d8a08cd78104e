"""Of `benchmarks/gpu.py`: what there is, and each Triton kernel against plain torch in fp64 on the CPU, on random and on nasty input."""

from __future__ import annotations

import functools
import itertools
import platform
import subprocess
from typing import Any

import torch
from gpu_items import CPU, Item, Place, Skipped, relative_difference, within
from torch import Tensor

from dist_vsd.distributed.launch_checks import versions
from dist_vsd.kernels.choice import has_triton, kernels_in_words, served_by
from dist_vsd.kernels.compiled import compiled, kernels
from dist_vsd.kernels.compositing import accumulate, composite, visible
from dist_vsd.kernels.hash_encoding import hash_encode
from dist_vsd.kernels.sampling import Samples, sample_occupied
from dist_vsd.particles.hash_grid import HashGrid
from dist_vsd.particles.particle_configs import HashGridConfig

# fp32 against fp64: sums of up to 256 samples, exp(-x) of x up to some tens; of a norm, and of the greatest number.
ROUNDING = 1e-4
IN_CELLS = 1e-3  # where a point is in a cell, of 2,048 a side, is known to 1.2e-4 of its side in fp32
# Of rays, whose samples differ: some points are within rounding of a border of two cells, and some rays of an edge of the cube.
BORDERS = 2e-3
TARGET_WITHOUT_GPU = 90


def items(place: Place) -> list[Item]:
    """Return the items, most valuable first."""
    found = [Item("environment", "versions and machine", 10, lambda: {"figures": environment(place)})]
    names = list(kernels()) if has_triton() else []
    for name in names[:1] if place.small else names:
        found.append(Item("environment", f"compiled {name}", 15, functools.partial(compile_one, place, name)))
    for kind in ("random", "nasty"):
        for work in (sampling, compositing, leaving_out, hashing):
            name = f"{work.__name__.replace('_', ' ')}, {kind}"
            found.append(Item("kernels", name, 20, functools.partial(_with_triton, work, place, kind)))
    return found


def environment(place: Place) -> dict[str, Any]:
    """Return what there is."""
    found: dict[str, Any] = versions() | {"platform": platform.platform(), "cuda": torch.version.cuda, "cudnn": None}
    found["kernels"] = kernels_in_words(place.device)
    found["triton"] = _triton_version()
    if place.device.type != "cuda":
        return found | {"gpu": None, "driver": None}
    properties = torch.cuda.get_device_properties(place.device)
    found |= {"gpu": properties.name, "memory_gib": properties.total_memory / 2**30, "multiprocessors": properties.multi_processor_count}
    found |= {"capability": "sm_{}{}".format(*torch.cuda.get_device_capability(place.device)), "cudnn": torch.backends.cudnn.version()}
    found |= {"driver": _driver(), "matmul_tf32": torch.backends.cuda.matmul.allow_tf32, "cudnn_tf32": torch.backends.cudnn.allow_tf32}
    return found | {"nccl": ".".join(map(str, torch.cuda.nccl.version()))}


def _triton_version() -> str | None:
    if not has_triton():
        return None
    import triton

    return triton.__version__


def _driver() -> str | None:
    try:
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def compile_one(place: Place, name: str) -> dict[str, Any]:
    """Compile a kernel for this GPU; nothing may be spilled."""
    major, minor = torch.cuda.get_device_capability(place.device) if place.device.type == "cuda" else divmod(TARGET_WITHOUT_GPU, 10)
    found = compiled(name, 10 * major + minor)
    figures = {"target": found.target, "registers": found.registers, "shared_bytes": found.shared_bytes, "num_warps": found.num_warps}
    return {"figures": figures, "checks": [within("spilled bytes", found.spilled_bytes, 0)]}


def _with_triton(work: Any, place: Place, kind: str) -> dict[str, Any]:
    if not has_triton():
        raise Skipped("triton is not installed")
    with served_by("triton"):
        return {"checks": work(place, kind)}


def drawn(*shape: int, seed: int) -> Tensor:
    """Return numbers in [0, 1), fp32 on the CPU."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def rays_of(place: Place, kind: str) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """Return origins, directions and offsets on the CPU, fp32, and rays of an image."""
    if kind == "nasty":  # along axes and diagonals, in faces, edges and cells' borders, past the cube and away
        starts = [(0.1, -0.2, 0.3), (0, 0, 0), (1, 0.5, -0.5), (-1, -1, 0.2), (1, 1, 1), (1.5, 0, 0), (-3, 0, 0), (0, 3, 1), (2, 2, 2)]
        ways = [way for way in itertools.product((-1, 0, 1), repeat=3) if any(way)]
        pairs = list(itertools.product(starts, ways))
        origins, directions = (torch.tensor(rows, dtype=torch.float32) for rows in zip(*pairs, strict=True))
        offsets = torch.tensor([0.0, 0.5, 0.999])[torch.arange(len(pairs)) % 3]
        rays_per_image = len(pairs) // 2
    else:
        rays_per_image = 40 if place.small else 128**2
        count = 2 * rays_per_image
        origins = 3 * torch.nn.functional.normalize(drawn(count, 3, seed=1) - 0.5, dim=-1)
        directions, offsets = 3.2 * drawn(count, 3, seed=2) - 1.6 - origins, drawn(count, seed=3)
    return (origins, torch.nn.functional.normalize(directions, dim=-1), offsets), rays_per_image


def sampled(place: Place, kind: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Samples:
    """Return the samples of these rays, with room for a part of them."""
    rays, rays_per_image = rays_of(place, kind)
    num_samples, resolution = (12, 6) if place.small else (256, 32)
    cells = drawn(resolution, resolution, resolution, seed=4) < 0.5
    budget = max(rays_per_image, int(0.2 * rays_per_image * num_samples))
    moved = (values.to(device, dtype) for values in rays)
    return sample_occupied(*moved, cells.to(device), 1.0, num_samples, rays_per_image, budget)


def sampling(place: Place, kind: str) -> list[dict[str, Any]]:
    """Compare samples: with plain torch on the same device to the bit, with fp64 but for points near borders."""
    found, exact = sampled(place, kind, place.device), sampled(place, kind, CPU, torch.float64)
    with served_by("torch"):
        plain = sampled(place, kind, place.device)
    names = ("ray", "t", "delta", "first")
    differ = sum(not torch.equal(getattr(found, name), getattr(plain, name)) for name in names)
    counts, expected = found.first.diff().cpu(), exact.first.diff()
    checks = [within("tensors that differ from plain torch's", differ, 0)]
    if kind == "random":  # nasty rays lie in borders, where fp64 says otherwise by right
        checks.append(within("rays with other counts than in fp64", float((counts != expected).float().mean()), BORDERS))
        lengths = [accumulate(samples.delta, samples).to(CPU, torch.float64) for samples in (found, exact)]
        same = counts == expected
        checks.append(within("lengths along the other rays", relative_difference([lengths[0][same]], [lengths[1][same]]), BORDERS))
    return checks


def in_double(samples: Samples) -> Samples:
    """Return the same samples on the CPU in fp64."""
    t, delta = (values.to(CPU, torch.float64) for values in (samples.t, samples.delta))
    return Samples(samples.ray.cpu(), t, delta, samples.first.cpu(), samples.num_samples, samples.rays_per_image)


def field_of(samples: Samples, kind: str) -> tuple[Tensor, Tensor]:
    """Return densities and colours, on the CPU: fog, or none to opaque with surfaces and what is beyond all bounds."""
    count = samples.t.shape[0]
    density = drawn(count, seed=5)
    if kind == "nasty":
        density = 5 * density.square()
        density[::7], density[3::11], density[5::97] = 0.0, 1e10, 1e-6
    return density, drawn(count, 3, seed=6)


def composited(samples: Samples, density: Tensor, color: Tensor) -> dict[str, Tensor]:
    """Return all that is composited, and the gradients at cotangents of all of it."""
    density, color = density.clone().requires_grad_(), color.clone().requires_grad_()
    found = composite(density, color, samples)
    values = {"weights": found.weights, "color": found.color, "opacity": found.opacity, "depth": found.depth}
    pulls = [(drawn(*value.shape, seed=7 + i) - 0.5).to(value) for i, value in enumerate(values.values())]
    gradients = torch.autograd.grad(list(values.values()), (density, color), pulls)
    sums = accumulate(found.weights.detach() * samples.t, samples)
    return values | {"sums": sums, "gradient of density": gradients[0], "gradient of color": gradients[1]}


def compositing(place: Place, kind: str) -> list[dict[str, Any]]:
    """Compare what is composited and its gradients with fp64; and with itself, to the bit."""
    samples = sampled(place, kind, place.device)
    fields = field_of(samples, kind)
    found, again = (composited(samples, *(value.to(place.device) for value in fields)) for _ in range(2))
    exact = composited(in_double(samples), *(value.double() for value in fields))
    checks = [check for name in exact for check in both_errors(name, found[name], exact[name])]
    differ = sum(not torch.equal(found[name], again[name]) for name in found)
    return [*checks, within("tensors that differ the second time", differ, 0)]


def leaving_out(place: Place, kind: str) -> list[dict[str, Any]]:
    """Compare how many samples of each ray are visible with fp64; light of just the threshold may be on either side."""
    samples = sampled(place, kind, place.device)
    density = 20 * field_of(samples, kind)[0]
    budget = samples.t.shape[0] * samples.rays_per_image // samples.num_rays
    found, exact = visible(density.to(place.device), samples, budget), visible(density.double(), in_double(samples), budget)
    other = (found.first.diff().cpu() != exact.first.diff()).float().mean()
    return [within("rays with other counts than in fp64", float(other), BORDERS)]


def hashing(place: Place, kind: str) -> list[dict[str, Any]]:
    """Compare features and the tables' gradients with fp64."""
    config = HashGridConfig(log2_table_size=8, num_levels=4) if place.small else HashGridConfig()
    grid = HashGrid(config, torch.Generator().manual_seed(8))
    sizes, resolutions = [table.shape for table in grid.tables], grid.resolutions
    count = 60 if place.small else 2**17
    points = 2.2 * drawn(count, 3, seed=9) - 1.1
    if kind == "nasty":  # on vertices, in faces and beyond
        points = torch.tensor(list(itertools.product((-1.5, -1.0, -0.5, 0.0, 1.0, 1.2), repeat=3)))
    num_features = sum(size[1] for size in sizes)
    pull, filled = drawn(len(points), num_features, seed=10) - 0.5, torch.tensor(len(points) * 3 // 4, dtype=torch.int32)
    results = []
    for device, dtype in ((place.device, torch.float32), (CPU, torch.float64)):
        tables = [(4 * drawn(*size, seed=11 + i) - 2).to(device, dtype).requires_grad_() for i, size in enumerate(sizes)]
        features = hash_encode(points.to(device, dtype), tables, resolutions, filled.to(device))
        gradients = torch.autograd.grad(features, tables, pull.to(device, dtype))
        results.append({"features": features, "gradients": torch.cat([gradient.flatten() for gradient in gradients])})
    return [check for name in results[0] for check in both_errors(name, results[0][name], results[1][name], IN_CELLS)]


def both_errors(name: str, found: Tensor, exact: Tensor, bound: float = ROUNDING) -> list[dict[str, Any]]:
    """Return the checks of a tensor: the error's norm over the exact one's, and its greatest over the greatest exact number."""
    found, exact = found.detach().to(CPU, torch.float64), exact.detach()
    worst = (found - exact).abs().max() / exact.abs().max().clamp(min=1e-300)
    return [within(f"{name}, of the norm", relative_difference([found], [exact]), bound), within(f"{name}, worst", float(worst), bound)]
