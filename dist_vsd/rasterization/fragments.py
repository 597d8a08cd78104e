"""What pixels see of a mesh, and values at vertices interpolated there."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from dist_vsd.kernels.pixels import edge_functions, pixel_centres
from dist_vsd.kernels.silhouettes import crossing_edges
from dist_vsd.rasterization.edges import faces_across


@dataclasses.dataclass(frozen=True)
class Fragments:
    """What B cameras see of a mesh, pixel by pixel, rows from the top.

    Attributes:
        face: (B, H, W) int64, the face that a pixel's centre sees; -1 where there is none.
        barycentric: (B, H, W, 3) weights of the face's three vertices, perspective-correct, not negative, of sum 1; 0 where there is none.
            Differentiable in the vertices.
        depth: (B, H, W) distance along the viewing axis, scene units; 0 where there is none. Differentiable in the vertices.
        clip: (B, V, 4) the vertices in clip space: x and y grow to the right and upwards, x / w and y / w are in [-1, 1] in the picture,
            w is the distance along the viewing axis. Differentiable in the vertices.
        faces: (F, 3) int64, the mesh's.
    """

    face: Tensor
    barycentric: Tensor
    depth: Tensor
    clip: Tensor
    faces: Tensor

    @property
    def is_hit(self) -> Tensor:
        """(B, H, W) booleans: where a face is seen."""
        return self.face >= 0

    @functools.cached_property
    def silhouettes(self) -> Tensor:
        """(2, B, H, W) int64 of crossing_edges, found once for all pictures that are antialiased."""
        across, is_turned = faces_across(self.faces)
        return crossing_edges(self.clip, self.faces, across, is_turned, self.face, self.depth)


def fragments_of(clip: Tensor, faces: Tensor, face: Tensor) -> Fragments:
    """Return what pixels see, given (B, V, 4) clip coordinates, (F, 3) faces and the (B, H, W) face that each sees."""
    pixel = pixels(face)
    barycentric, depth = weights_of(clip, faces, face, pixel)
    return Fragments(face, spread(barycentric, pixel, face), spread(depth[:, None], pixel, face)[..., 0], clip, faces)


def weights_of(clip: Tensor, faces: Tensor, face: Tensor, pixel: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (P, 3) weights of the corners of the faces that (P,) pixels see, and the (P,) depths there; see Fragments."""
    size = face.shape[1]
    x, y, _, w = zip(*(corner.unbind(-1) for corner in corners_of(clip, faces, face, pixel)), strict=True)
    e = edge_functions(x, y, w, *pixel_centres(pixel // size % size, pixel % size, size, clip.dtype))
    # Where the face was found in a lower precision a centre may be beside it by a thousandth of a pixel: it is taken to the edge.
    sign = (e[0] + e[1] + e[2]).detach().sign()
    e = [(sign * one).clamp_min(0.0) for one in e]
    total = e[0] + e[1] + e[2]
    inverse = torch.where(total > 0, 1.0 / torch.where(total > 0, total, 1.0), 0.0)
    b = [one * inverse for one in e]
    return torch.stack(b, -1), b[0] * w[0] + b[1] * w[1] + b[2] * w[2]


def interpolate(attributes: Tensor, fragments: Fragments) -> Tensor:
    """Interpolate values at vertices to pixels, perspective-correct; differentiable in them, and in the vertices' places.

    Args:
        attributes: (V, C), or (B, V, C) where they differ between pictures.
        fragments: of rasterize.

    Returns:
        (B, H, W, C); 0 where nothing is seen.
    """
    pixel = pixels(fragments.face)
    weights = fragments.barycentric.flatten(0, 2).index_select(0, pixel).unbind(-1)
    one, two, three = corners_of(attributes, fragments.faces, fragments.face, pixel)
    values = weights[0][:, None] * one + weights[1][:, None] * two + weights[2][:, None] * three
    return spread(values, pixel, fragments.face)


def pixels(face: Tensor) -> Tensor:
    """Return the indices of pixels to compute: on a CPU those that see a face, elsewhere all, as to count them is to wait."""
    if face.device.type == "cpu":
        return (face.flatten() >= 0).nonzero()[:, 0]
    return torch.arange(face.numel(), device=face.device)


def spread(values: Tensor, pixel: Tensor, face: Tensor) -> Tensor:
    """Return (B, H, W, C), given (P, C) values at pixels; 0 at the others."""
    if len(pixel) < face.numel():
        values = values.new_zeros(face.numel(), values.shape[-1]).index_copy(0, pixel, values)
    return values.view(*face.shape, values.shape[-1])


def corners_of(values: Tensor, faces: Tensor, face: Tensor, pixel: Tensor) -> list[Tensor]:
    """Return (P, C) values of (V, C) or (B, V, C) at the first, second and third vertices of the faces that pixels see; 0 of no face."""
    vertices = vertices_of(face.flatten()[pixel], faces)
    if values.dim() == 3:
        vertices = vertices + (pixel // face[0].numel() * values.shape[1])[:, None]
        values = values.flatten(0, 1)
    values = values if len(values) else values.new_zeros(1, values.shape[-1]).expand(max(1, len(face)), -1)
    corners = [values.index_select(0, index) for index in vertices.unbind(-1)]
    if face.device.type == "cpu":
        return corners
    is_hit = (face.flatten()[pixel] >= 0)[:, None]  # of a face that is not seen no number may spoil the gradient
    return [torch.where(is_hit, corner, 0.0) for corner in corners]


def vertices_of(face: Tensor, faces: Tensor) -> Tensor:
    """Return (..., 3) vertices of the faces of (...,) indices; those of face 0 for -1, and 0 where there are no faces."""
    return (faces if len(faces) else faces.new_zeros(1, 3)).index_select(0, face.clamp_min(0).flatten()).view(*face.shape, 3)
