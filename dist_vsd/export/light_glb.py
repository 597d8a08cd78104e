"""A mesh once more, with few faces and colours at its vertices: what fits into a page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from scipy.spatial import cKDTree
from torch import Tensor

from dist_vsd.export.glb import TO_GLTF, to_srgb, write_glb
from dist_vsd.export.mesh import MeshOptions, make_mesh
from dist_vsd.export.surface import Surface


def write_light_glb(glb: bytes, max_faces: int, file: Path) -> None:
    """Write a GLB of glb.py again, with fewer faces; a texture becomes the colours that it has at the vertices.

    Args:
        glb: with a texture or with colours at vertices.
        max_faces: at the most, or about (simplify.py).
        file: to write.

    Raises:
        ValueError: it is damaged, or holds no mesh.
    """
    try:
        (mesh,) = trimesh.load(io.BytesIO(glb), file_type="glb", process=False).geometry.values()
        colors = _vertex_colors(mesh)
    except Exception as error:  # trimesh's readers raise whatever their parsers do
        raise ValueError(f"it is no GLB of a mesh ({error})") from error
    places = np.asarray(mesh.vertices, np.float32) @ TO_GLTF[:3, :3].astype(np.float32)
    if not len(mesh.faces) or not np.isfinite(places).all():
        raise ValueError("it holds no triangles of finite size")
    light = make_mesh(_without_seams(places, mesh.faces, colors), MeshOptions(texture_size=0, max_faces=max_faces, keep_fragments=True))
    write_glb(light, file, with_normals=False)


def _vertex_colors(mesh: trimesh.Trimesh) -> np.ndarray:
    """Return (V, 3) colours at vertices, sRGB in [0, 1]."""
    material: Any = getattr(mesh.visual, "material", None)
    picture = getattr(material, "baseColorTexture", None)
    if picture is None:
        colors = np.asarray(mesh.visual.vertex_attributes["color"])
        most = np.iinfo(colors.dtype).max if colors.dtype.kind == "u" else 1  # whole numbers stand for shares, as other programs write them
        return to_srgb((colors[:, :3] / most).clip(0, 1))
    texels = np.asarray(picture.convert("RGB"))
    size = np.array([texels.shape[1], texels.shape[0]])
    x, y = (np.stack([mesh.visual.uv[:, 0], 1 - mesh.visual.uv[:, 1]], 1) * size).astype(int).clip(0, size - 1).T  # trimesh counts upwards
    return texels[y, x] / 255


def _without_seams(places: np.ndarray, faces: np.ndarray, colors: np.ndarray) -> Surface:
    """Return a surface on which a texture's cuts are closed, and points have the colour of the nearest vertex."""
    vertices, first, index = np.unique(places, axis=0, return_index=True, return_inverse=True)
    tree, colors = cKDTree(vertices), torch.from_numpy(colors[first])

    def color(points: Tensor) -> Tensor:
        return colors[torch.from_numpy(tree.query(points.numpy())[1])]

    return Surface(vertices, index.reshape(-1)[faces].astype(np.int32), color)
