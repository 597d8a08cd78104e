"""All implementations of the kernels side by side: Triton's, compiled where there is a GPU and interpreted elsewhere; in C; plain torch."""

import pytest
import torch

from dist_vsd.kernels.choice import has_triton, lacking_c
from dist_vsd.kernels.sampling import sample_occupied

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEEDS_TRITON = pytest.mark.skipif(not has_triton(), reason="triton is not installed: pip install triton")
NEEDS_C = pytest.mark.skipif(bool(lacking_c(DEVICE)), reason=lacking_c(DEVICE) or "kernels in C are there")
TRITON_AND_C = [pytest.param("triton", marks=NEEDS_TRITON), pytest.param("c", marks=NEEDS_C)]
EACH = pytest.mark.parametrize("kernels", ["torch", *TRITON_AND_C])
BOUND = 1.0


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=generator(seed), dtype=torch.float64).to(DEVICE, dtype)


def random_rays(count, seed=0, dtype=torch.float32):
    """Rays from outside towards the cube, of which some miss it; and offsets."""
    origins = torch.nn.functional.normalize(drawn(count, 3, seed=seed, dtype=torch.float64) - 0.5, dim=-1) * 3
    directions = 1.6 * (drawn(count, 3, seed=seed + 1, dtype=torch.float64) * 2 - 1) - origins
    directions = torch.nn.functional.normalize(directions, dim=-1)
    return origins.to(dtype), directions.to(dtype), drawn(count, seed=seed + 2, dtype=dtype)


def random_cells(resolution=6, share=0.5, seed=5):
    return drawn(resolution, resolution, resolution, seed=seed) < share


def random_samples(num_images=2, rays_per_image=20, num_samples=40, budget=500, dtype=torch.float32, seed=0):
    """Samples of rays with none to many on them, and slots left over."""
    rays = random_rays(num_images * rays_per_image, seed, dtype)
    return sample_occupied(*rays, random_cells(), BOUND, num_samples, rays_per_image, budget)
