"""What pixels see of a mesh, and values at vertices interpolated there."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dist_vsd.kernels.pixels import edge_functions, pixel_centres


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


def fragments_of(clip: Tensor, faces: Tensor, face: Tensor) -> Fragments:
    """Return what pixels see, given (B, V, 4) clip coordinates, (F, 3) faces and the (B, H, W) face that each sees."""
    is_hit, size = face >= 0, face.shape[1]
    corners = rows(clip[..., [0, 1, 3]], vertices_of(face, faces))
    x, y, w = torch.where(is_hit[..., None, None], corners, 0.0).unbind(-1)
    places = torch.arange(size, device=face.device)
    centre_x, centre_y = pixel_centres(places[:, None], places[None, :], size, clip.dtype)
    e = torch.stack(edge_functions(x, y, w, centre_x, centre_y), -1)
    # Where the face was found in a lower precision a centre may be beside it by a thousandth of a pixel: it is taken to the edge.
    e = (e * e.detach().sum(-1, keepdim=True).sign()).clamp_min(0.0)
    total = e.sum(-1)
    is_solid = total > 0
    inverse = torch.where(is_solid, 1.0 / torch.where(is_solid, total, 1.0), 0.0)
    barycentric = e * inverse[..., None]
    return Fragments(face, barycentric, (barycentric * w).sum(-1), clip, faces)


def vertices_of(face: Tensor, faces: Tensor) -> Tensor:
    """Return (..., 3) vertices of the faces of (...,) indices; those of face 0 for -1, and 0 where there are no faces."""
    return (faces if len(faces) else faces.new_zeros(1, 3)).index_select(0, face.clamp_min(0).flatten()).view(*face.shape, 3)


def rows(values: Tensor, index: Tensor) -> Tensor:
    """Return (B, ..., C) rows of (B, V, C) values at (B, ...) indices of vertices; differentiable in the values."""
    first = torch.arange(len(values), device=index.device) * values.shape[1]
    in_all = (index.flatten(1) + first[:, None]).flatten()
    return flat(values).index_select(0, in_all).view(*index.shape, values.shape[-1])


def flat(values: Tensor) -> Tensor:
    """Return (B V, C) rows of (B, V, C) values; where there are no vertices one of zeros each, so that there is an index."""
    return (values if values.shape[1] else values.new_zeros(len(values), 1, values.shape[2])).flatten(0, 1)


def interpolate(attributes: Tensor, fragments: Fragments) -> Tensor:
    """Interpolate values at vertices to pixels, perspective-correct; differentiable in them, and in the vertices' places.

    Args:
        attributes: (V, C), or (B, V, C) where they differ between pictures.
        fragments: of rasterize.

    Returns:
        (B, H, W, C); 0 where nothing is seen.
    """
    index = vertices_of(fragments.face, fragments.faces)
    if attributes.dim() == 2:
        attributes, index = attributes[None], index[None]
    corners = rows(attributes, index).view(*fragments.face.shape, 3, attributes.shape[-1])
    return (fragments.barycentric[..., None] * corners).sum(-2)
