"""Which face a pixel sees, by nvdiffrast (Laine et al. 2020) on CUDA, where it can be imported.

Barycentric coordinates, depth and silhouettes are ours with either back end. nvdiffrast rounds vertices to a fraction of a pixel, and
gives a pixel whose centre is on an edge to one face by a rule of its own: pixels at the borders of faces may differ from ours.
Believed, not tried: no machine that tests this has nvdiffrast.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor


@functools.cache
def has_nvdiffrast() -> bool:
    """Say whether nvdiffrast is installed, without importing it."""
    return importlib.util.find_spec("nvdiffrast") is not None


@functools.cache
def _context(device: torch.device) -> object:
    import nvdiffrast.torch

    return nvdiffrast.torch.RasterizeCudaContext(device)


@torch.no_grad()
def nearest_faces(clip: Tensor, faces: Tensor, size: int) -> Tensor:
    """Return the (B, size, size) int64 face that each pixel sees, -1 for none; see kernels/rasterization.py.

    Args:
        clip: (B, V, 4) on CUDA.
        faces: (F, 3) int64.
        size: pixels a side, at most 2048.
    """
    if not (clip.numel() and faces.numel()):
        return torch.full((len(clip), size, size), -1, device=clip.device, dtype=torch.int64)
    import nvdiffrast.torch

    context = _context(clip.device)
    found, _ = nvdiffrast.torch.rasterize(
        context, clip.detach().float().contiguous(), faces.int().contiguous(), (size, size), grad_db=False
    )
    return found[..., 3].flip(1).long() - 1  # its rows begin at the bottom, its faces at 1
