"""Which silhouette crosses between the centres of two neighbouring pixels, with the same arithmetic in Triton, in C and in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vsd.kernels import c_kernels
from dist_vsd.kernels.choice import serving
from dist_vsd.kernels.pixels import NEAR, decisive, edge_functions, pixel_centres

NUM_STEPS = 64  # faces that are gone through between two pixels' centres, at most


@torch.no_grad()
def crossing_edges(clip: Tensor, faces: Tensor, across: Tensor, is_turned: Tensor, face: Tensor, depth: Tensor) -> Tensor:
    """Find the silhouette that ends the nearer of two neighbouring pixels' surfaces before the other's centre.

    From the nearer pixel's centre the way to the other's leads out of its face through an edge, into the face across that edge, and so on,
    until the edge is a silhouette: until it has no other face, or one that faces away. (Laine et al. 2020 look at the first face alone,
    and lose the silhouettes of faces that are smaller than a pixel.) A face that reaches through the plane of NEAR ends the search.

    Args:
        clip: (B, V, 4), as nearest_faces takes them.
        faces: (F, 3) int64.
        across, is_turned: (F, 3) of faces_across.
        face: (B, H, W) int64 of nearest_faces.
        depth: (B, H, W) there.

    Returns:
        (2, B, H, W) int64, of each pixel with its right and its lower neighbour: 6 face + 2 edge + whether the nearer pixel is the
        neighbour; -1 where no silhouette is found.
    """
    xyw, depth = decisive(clip), depth.detach().float().contiguous()
    if xyw.is_meta or not xyw.numel() or not faces.numel():
        return face.new_full((2, *face.shape), -1)
    tensors = (xyw, faces.contiguous(), across.contiguous(), is_turned.contiguous(), face.contiguous(), depth)
    by = serving(xyw)
    if by == "triton":
        from dist_vsd.kernels.silhouettes_triton import crossing_edges as in_triton

        return in_triton(*tensors, NEAR, NUM_STEPS)
    return c_kernels.crossing_edges(*tensors, NEAR, NUM_STEPS) if by == "c" else _crossing_edges(*tensors)


def _crossing_edges(xyw: Tensor, faces: Tensor, across: Tensor, is_turned: Tensor, face: Tensor, depth: Tensor) -> Tensor:
    """The same in plain torch, all pairs of pixels a step at a time."""
    is_silhouette, is_whole = _of_faces(xyw, faces, across, is_turned)
    beside = torch.stack([face.roll(-1, 2), face.roll(-1, 1)])
    is_other = (face < 0) | ((beside >= 0) & (torch.stack([depth.roll(-1, 2), depth.roll(-1, 1)]) < depth))
    at, is_going = torch.where(is_other, beside, face).clamp_min(0), beside != face
    is_going[0, :, :, -1], is_going[1, :, -1] = False, False
    is_down, image, row, column = _places(at)
    centre = pixel_centres(row + (is_other & is_down), column + (is_other & ~is_down), face.shape[1], xyw.dtype)
    sign = torch.where(is_other == is_down, 1.0, -1.0)  # of x, or of y, towards the other pixel
    edge, vertices, first = torch.full_like(at, -1), xyw.flatten(0, 1), (image * xyw.shape[1])[..., None]
    for _ in range(NUM_STEPS):
        if xyw.device.type == "cpu" and not is_going.any():
            break  # elsewhere to ask is to wait
        along, leaving, fits = _exit(vertices[faces[at] + first], *centre, is_down, sign, face.shape[1])
        is_going &= (along <= 1.0) & is_whole[image, at]
        is_end = is_going & is_silhouette[image, at, leaving]
        edge = torch.where(is_end & fits, 6 * at + 2 * leaving + is_other, edge)
        is_going &= ~is_end
        at = torch.where(is_going, across[at, leaving], at)
    return edge


def _places(pairs: Tensor) -> tuple[Tensor, ...]:
    """Return whether a pair is in a column, its image, row and column, in the (2, B, H, W) of pairs."""
    of_axis = [
        torch.arange(length, device=pairs.device).view([-1 if k == axis else 1 for k in range(4)])
        for axis, length in enumerate(pairs.shape)
    ]
    return tuple(values.expand_as(pairs) for values in (of_axis[0] == 1, *of_axis[1:]))


def _of_faces(xyw: Tensor, faces: Tensor, across: Tensor, is_turned: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, F, 3) which edges are silhouettes, and (B, F) which faces are wholly before the camera."""
    x, y, w = (values.unbind(-1) for values in xyw[:, faces].unbind(-1))
    centre = xyw.new_zeros(())
    e = edge_functions(x, y, w, centre, centre)
    facing = (e[0] * w[0] + e[1] * w[1] + e[2] * w[2]).sign()
    other = facing[:, across.clamp_min(0)] * torch.where(is_turned, -1.0, 1.0)
    return (across < 0) | (facing[..., None] * other < 0), (torch.minimum(torch.minimum(w[0], w[1]), w[2]) > NEAR)


def _exit(corners: Tensor, centre_x: Tensor, centre_y: Tensor, is_down: Tensor, sign: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the way out of faces.

    Returns:
        where it leads out, in pixels from the centre, infinite if nowhere; through which edge; whether that edge is looked for in this
        direction: one that rises by as much as it goes across between the pixels of a row, a flatter one between those of a column.
    """
    x, y, w = corners.unbind(-1)
    x, y = x - centre_x[..., None] * w, y - centre_y[..., None] * w
    u, v = torch.where(is_down[..., None], y, x) * sign[..., None], torch.where(is_down[..., None], x, y)
    along, leaving, fits = torch.full_like(sign, -torch.inf), torch.zeros_like(sign, dtype=torch.int64), torch.zeros_like(is_down)
    for edge, (i, j) in enumerate(((1, 2), (2, 0), (0, 1))):
        long, wide = w[..., i] * u[..., j] - w[..., j] * u[..., i], w[..., i] * v[..., j] - w[..., j] * v[..., i]
        place = (u[..., i] * v[..., j] - v[..., i] * u[..., j]) / torch.where(wide == 0, 1.0, wide) * (size * 0.5)
        is_farther = ((v[..., i] >= 0) != (v[..., j] >= 0)) & (place > along)
        along, leaving = torch.where(is_farther, place, along), torch.where(is_farther, edge, leaving)
        fits = torch.where(is_farther, (wide.abs() > long.abs()) | (~is_down & (wide.abs() == long.abs())), fits)
    return torch.where(along == -torch.inf, torch.inf, along), leaving, fits
