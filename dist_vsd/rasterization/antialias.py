"""Antialiased silhouettes, through which a picture's gradient moves vertices."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vsd.kernels.pixels import pixel_centres
from dist_vsd.rasterization.fragments import Fragments, vertices_of


def antialias(picture: Tensor, fragments: Fragments) -> Tensor:
    """Blend pixels at silhouettes by how much of them is covered.

    After Laine et al. 2020, "Modular primitives for high-performance differentiable rendering", section 3.5.

    Where a silhouette crosses between the centres of two neighbouring pixels, at a share s of the way from the nearer surface's centre,
    the pixel in which it crosses takes |1/2 - s| of the other's colour. Steep silhouettes are looked for between neighbours in a row,
    flat ones in a column. So a sum over pixels follows the vertices: differentiable in them, and in the picture.

    Args:
        picture: (B, H, W, C), one value a pixel as its centre sees it.
        fragments: of rasterize.

    Returns:
        (B, H, W, C).
    """
    pair = pairs(fragments.silhouettes)
    found = fragments.silhouettes.flatten()[pair]
    nearer, other, share = _crossings(found, pair, fragments)
    is_in_nearer = share < 0.5
    target, source = torch.where(is_in_nearer, nearer, other), torch.where(is_in_nearer, other, nearer)
    weight = torch.where(found < 0, 0.0, torch.where(is_in_nearer, 0.5 - share, share - 0.5))
    colors = picture.flatten(0, 2)
    change = weight[:, None] * (colors.index_select(0, source) - colors.index_select(0, target))
    return colors.index_add(0, target, change).view_as(picture)


def coverage(fragments: Fragments) -> Tensor:
    """Return (B, H, W) in [0, 1]: how much of each pixel is covered; differentiable in the vertices at silhouettes."""
    return antialias(fragments.is_hit[..., None].to(fragments.clip.dtype), fragments)[..., 0]


def pairs(found: Tensor) -> Tensor:
    """Return the indices of pairs of pixels to look at: on a CPU those with a silhouette, elsewhere all, as to count them is to wait."""
    if found.device.type == "cpu":
        return (found.flatten() >= 0).nonzero()[:, 0]
    return torch.arange(found.numel(), device=found.device)


def _crossings(found: Tensor, pair: Tensor, fragments: Fragments) -> tuple[Tensor, Tensor, Tensor]:
    """Return (P,) the nearer pixel, the other one, and where in [0, 1] on the way between them the silhouette crosses."""
    num_images, height, width = fragments.face.shape
    is_down, pixel = pair >= fragments.face.numel(), pair % fragments.face.numel()
    beside = (pixel + torch.where(is_down, width, 1)).clamp_max(max(0, fragments.face.numel() - 1))  # the last has none, nor a silhouette
    is_other = found.remainder(2) == 1
    nearer, other = torch.where(is_other, beside, pixel), torch.where(is_other, pixel, beside)
    centre = pixel_centres(nearer // width % height, nearer % width, width, fragments.clip.dtype)
    x, y, w = _ends(found, nearer // (height * width), fragments)
    x, y = x - centre[0][:, None] * w, y - centre[1][:, None] * w
    u, v = torch.where(is_down[:, None], y, x), torch.where(is_down[:, None], x, y)
    share = (u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]) / (w[:, 0] * v[:, 1] - w[:, 1] * v[:, 0]) * (0.5 * width)
    return nearer, other, torch.where(is_other == is_down, share, -share).clamp(0.0, 1.0)


def _ends(found: Tensor, image: Tensor, fragments: Fragments) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, y and w, (P, 2) each, of both ends of the edges that were found; of the picture's diagonal where none was."""
    edge, clip = found.clamp_min(0) // 2, fragments.clip
    ends = torch.stack([(edge + 1) % 3, (edge + 2) % 3], -1)
    index = vertices_of(edge // 3, fragments.faces).gather(-1, ends) + (image * clip.shape[1])[:, None]
    clip = clip if clip.shape[1] else clip.new_zeros(len(clip), 1, 4)
    x, y, _, w = clip.flatten(0, 1).index_select(0, index.flatten()).view(-1, 2, 4).unbind(-1)
    is_found, diagonal = (found >= 0)[:, None], torch.arange(-1, 2, 2, device=found.device).to(clip.dtype)
    return torch.where(is_found, x, diagonal), torch.where(is_found, y, diagonal), torch.where(is_found, w, 1.0)
