"""One function, (vertices, faces, cameras) -> what each pixel sees, by whichever back end there is."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.kernels.pixels import NEAR
from dist_vsd.kernels.rasterization import nearest_faces
from dist_vsd.rasterization import nvdiffrast_back_end
from dist_vsd.rasterization.antialias import antialias, coverage
from dist_vsd.rasterization.fragments import Fragments, fragments_of, interpolate
from dist_vsd.rasterization.normals import vertex_normals

__all__ = ["BACK_ENDS", "Fragments", "antialias", "coverage", "interpolate", "rasterize", "vertex_normals"]

BACK_ENDS = ("own", "nvdiffrast")


def rasterize(vertices: Tensor, faces: Tensor, cameras: Cameras, size: int, back_end: str = "") -> Fragments:
    """Find what each pixel's centre sees of a mesh.

    Which face is nearest is decided without a gradient (kernels/rasterization.py); barycentric coordinates and depth are then computed
    from that face's vertices, and are differentiable in them. Faces are seen from both sides; what is nearer to a camera than 0.01 along
    its viewing axis is clipped away. Through a change of the face itself no gradient flows: see antialias for silhouettes.

    Args:
        vertices: (V, 3) world coordinates, floating point.
        faces: (F, 3) int64; may be none at all.
        cameras: B cameras, on the vertices' device.
        size: H = W, pixels a side.
        back_end: one of BACK_ENDS; empty: nvdiffrast on CUDA where it can be imported, elsewhere our own.

    Raises:
        ValueError: shapes, types, size or back end are not as above.
    """
    _check(vertices, faces, size, back_end)
    clip = clip_positions(vertices, cameras)
    by_nvdiffrast = (back_end or default_back_end(vertices.device)) == "nvdiffrast"
    return fragments_of(clip, faces, (nvdiffrast_back_end.nearest_faces if by_nvdiffrast else nearest_faces)(clip, faces, size))


def default_back_end(device: torch.device) -> str:
    """Return which of BACK_ENDS serves a device."""
    return "nvdiffrast" if device.type == "cuda" and nvdiffrast_back_end.has_nvdiffrast() else "own"


def _check(vertices: Tensor, faces: Tensor, size: int, back_end: str) -> None:
    if vertices.dim() != 2 or vertices.shape[1] != 3 or not vertices.is_floating_point():
        raise ValueError(f"vertices must be (V, 3) of floating point, got {tuple(vertices.shape)} of {vertices.dtype}: change them")
    if faces.dim() != 2 or faces.shape[1] != 3 or faces.dtype != torch.int64:
        raise ValueError(f"faces must be (F, 3) of int64, got {tuple(faces.shape)} of {faces.dtype}: change them")
    if size < 1:
        raise ValueError(f"a picture must have at least 1 pixel a side, got {size}: raise size")
    if back_end not in ("", *BACK_ENDS):
        raise ValueError(f"the back end must be one of {', '.join(BACK_ENDS)}, or empty, got {back_end!r}: change it")
    if back_end == "nvdiffrast" and not (vertices.is_cuda and nvdiffrast_back_end.has_nvdiffrast()):
        raise ValueError(f"nvdiffrast needs CUDA and to be installed, got vertices on {vertices.device}: leave the back end empty")
    if faces.device.type == "cpu" and len(faces):  # on a GPU to ask would be to wait
        first, last = int(faces.min()), int(faces.max())
        if first < 0 or last >= len(vertices):
            raise ValueError(f"faces must name vertices from 0 to {len(vertices) - 1}, got {first} to {last}: change them")


def clip_positions(vertices: Tensor, cameras: Cameras) -> Tensor:
    """Return (B, V, 4) clip coordinates of (V, 3) vertices, as Fragments has them; z / w grows from -1 at NEAR to 1 at infinity."""
    c2w, half = cameras.c2w.to(vertices.dtype), torch.tan(cameras.fov.to(vertices.dtype) / 2)[:, None]
    offset = (vertices[None] - c2w[:, None, :3, 3]).unbind(-1)
    # Not as a matrix product, which autocast and TF32 would round to a hundredth of a pixel and more.
    x, y, backward = (sum(offset[axis] * c2w[:, axis, column, None] for axis in range(3)) for column in range(3))
    return torch.stack([x / half, y / half, -backward - 2 * NEAR, -backward], -1)
