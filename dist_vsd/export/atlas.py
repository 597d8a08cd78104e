"""A surface's charts on a square: laid out by xatlas, or as a user's own mesh has them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dist_vsd.export.surface import Atlas, Surface
from dist_vsd.kernels.rasterization import nearest_faces
from dist_vsd.rasterization.fragments import pixels, weights_of

# Charts are laid out on a grid of this side, whatever the texture's, with so many of its cells between them: of a texture at an eighth of
# its size, a cell is left. Half the padding lets seams show where an object is a thumbnail; twice costs a third of the square.
LAYOUT_SIDE, PADDING = 512, 4
# Of the whole surface: xatlas' time grows with the square of a chart's size, and no limit takes ten times as long for a twentieth more
# of the square covered.
GREATEST_CHART = 1 / 60
CHUNK_TEXELS = 1 << 20
# A user's own places on a texture are looked at on a grid of this side. They may be beyond the square by the first, a share of what they
# cover may be covered twice, and a share of the surface may be without room: rounding, and what other programs leave of both.
CHECKED_SIDE, BEYOND, MOST_TWICE, MOST_WITHOUT = 1024, 1e-4, 0.005, 0.01
ON_EDGE, NO_ROOM = 1e-3, 1e-10  # a weight of a corner; an area on the square


def require_xatlas() -> None:
    """Refuse where xatlas is missing: it is on PyPI without a wheel for Python 3.14.

    Raises:
        ValueError: it is.
    """
    if importlib.util.find_spec("xatlas") is None:
        raise ValueError("a texture needs xatlas, which is not installed: pip install xatlas, or give --texture-size 0 for vertex colours")


def unwrap(surface: Surface) -> Atlas:
    """Cut a surface into charts and lay them out on the unit square without overlap, by xatlas (github.com/jpcy/xatlas)."""
    import xatlas

    # Its thresholds are absolute lengths: a surface of area 1000 is far from them.
    scale = np.sqrt(1000.0 / max(areas(surface.vertices[surface.faces]).sum(), 1e-12))
    atlas, charts, packing = xatlas.Atlas(), xatlas.ChartOptions(), xatlas.PackOptions()
    atlas.add_mesh(surface.vertices * np.float32(scale), surface.faces.astype(np.uint32))
    charts.max_chart_area = 1000.0 * GREATEST_CHART
    packing.resolution, packing.padding, packing.bruteForce = LAYOUT_SIDE, PADDING, True
    atlas.generate(charts, packing)
    vertex, faces, uv = atlas.get_mesh(0)
    # xatlas measures along both sides of its rectangle, which is about a square: texels are square on ours.
    side = np.array([atlas.width, atlas.height], np.float32)
    return Atlas(vertex.astype(np.int64), faces.astype(np.int32), (uv * side / side.max()).astype(np.float32), atlas.chart_count)


def texels(atlas: Atlas, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Find the texels whose centres lie on a surface, some at a time, as pixels of a picture seen from straight above.

    Args:
        atlas: of the surface.
        size: height and width of the picture, texels.

    Yields:
        (N,) indices of texels, row by row; (N,) of the faces that they lie on; (N, 3) weights of their corners, which sum to 1.
    """
    clip, faces = _flat(atlas)
    face = nearest_faces(clip, faces, size)
    for texel in pixels(face).split(CHUNK_TEXELS):
        yield texel.numpy(), face.flatten()[texel].numpy(), weights_of(clip, faces, face, texel)[0].numpy()


def _flat(atlas: Atlas) -> tuple[Tensor, Tensor]:
    """Return an atlas as a mesh in clip space, all of it at distance 1: (1, W, 4) vertices and (F, 3) faces."""
    u, v = torch.from_numpy(atlas.uv).float().unbind(1)
    return torch.stack([2 * u - 1, 1 - 2 * v, torch.zeros_like(u), torch.ones_like(u)], 1)[None], torch.from_numpy(atlas.faces).long()


def fault_of(surface: Surface, atlas: Atlas) -> str:
    """Say why an atlas can't hold a colour for each point of its surface, in words that go on a sentence about it; nothing if it can."""
    low, high = float(atlas.uv.min()), float(atlas.uv.max())
    if low < -BEYOND or high > 1 + BEYOND:
        return f"reach from {low:.3g} to {high:.3g}, beyond [0, 1]"
    area, room = areas(surface.vertices[surface.faces]), areas(atlas.uv[atlas.faces])
    without = float(area[room <= NO_ROOM].sum() / area.sum())
    if without > MOST_WITHOUT:
        return f"leave {without:.0%} of the surface without room"
    twice = _covered_twice(atlas)
    return f"overlap in {twice:.1%} of what they cover" if twice > MOST_TWICE else ""


def _covered_twice(atlas: Atlas) -> float:
    """Return the share of covered texels whose centres lie in several faces: there the first of them is not the last."""
    clip, faces = _flat(atlas)
    first = nearest_faces(clip, faces, CHECKED_SIDE)
    last = nearest_faces(clip, faces.flip(0), CHECKED_SIDE)
    last = torch.where(last < 0, -1, len(faces) - 1 - last)
    pixel = (first != last).flatten().nonzero()[:, 0]
    inside = [weights_of(clip, faces, face, pixel)[0].amin(1) > ON_EDGE for face in (first, last)]
    return float((inside[0] & inside[1]).sum() / (first >= 0).sum().clamp_min(1))


def areas(corners: np.ndarray) -> np.ndarray:
    """Return the (F,) areas of triangles with (F, 3, 2 or 3) corners."""
    one, other = (corners[:, i].astype(np.float64) - corners[:, 0] for i in (1, 2))
    crossed = one[:, 0] * other[:, 1] - one[:, 1] * other[:, 0] if corners.shape[2] == 2 else np.linalg.norm(np.cross(one, other), axis=1)
    return np.abs(crossed) / 2
