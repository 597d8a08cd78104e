"""A texture for a surface: its charts laid out on a square by xatlas, and the colour of each texel asked of the particle."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import torch

from dist_vsd.export.rasterize import Colors, fragments
from dist_vsd.export.surface import Surface

LEAST_SIZE, MOST_SIZE = 512, 4096
# Charts are laid out on a grid of this side, whatever the texture's, with so many of its cells between them: of a texture at an eighth of
# its size, a cell is left. Half the padding lets seams show where an object is a thumbnail; twice costs a third of the square.
LAYOUT_SIDE, PADDING = 512, 4
# Of the whole surface: xatlas' time grows with the square of a chart's size, and no limit takes ten times as long for a twentieth more
# of the square covered.
GREATEST_CHART = 1 / 60


@dataclasses.dataclass(frozen=True)
class Atlas:
    """A surface cut into charts that lie on the unit square.

    Attributes:
        vertex: (W,) of which vertex of the surface each of the atlas' vertices is a copy; those on a cut have several.
        faces: (F, 3) int32 into the atlas' vertices: the surface's, in their order.
        uv: (W, 2) fp32 places in [0, 1], to the right and, as in a picture and in glTF, downwards.
        num_charts: pieces.
    """

    vertex: np.ndarray
    faces: np.ndarray
    uv: np.ndarray
    num_charts: int


@dataclasses.dataclass(frozen=True)
class Texture:
    """An atlas with its colours.

    Attributes:
        atlas: where on the picture the surface lies.
        picture: (T, T, 3) uint8, sRGB; filled between the charts by what is nearest.
        coverage: share of the texels whose centres lie on the surface.
        texels_per_unit: along a length on the surface, on average, 1 / scene units.
    """

    atlas: Atlas
    picture: np.ndarray
    coverage: float
    texels_per_unit: float

    def colors(self) -> Colors:
        """Return what looks colours up, bilinearly, as viewers do."""
        picture = torch.from_numpy(self.picture).permute(2, 0, 1)[None].float() / 255
        corners = self.atlas.uv[self.atlas.faces]

        def look_up(face: np.ndarray, weights: np.ndarray) -> np.ndarray:
            uv = torch.from_numpy((corners[face] * weights[..., None]).sum(1)).float()
            found = torch.nn.functional.grid_sample(picture, uv[None, None] * 2 - 1, padding_mode="border", align_corners=False)
            return found[0, :, 0].T.numpy()

        return look_up


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

    corners = surface.vertices[surface.faces].astype(np.float64)
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1).sum() / 2
    # Its thresholds are absolute lengths: a surface of area 1000 is far from them.
    scale = np.sqrt(1000.0 / max(area, 1e-12))
    atlas, charts, packing = xatlas.Atlas(), xatlas.ChartOptions(), xatlas.PackOptions()
    atlas.add_mesh(surface.vertices * np.float32(scale), surface.faces.astype(np.uint32))
    charts.max_chart_area = 1000.0 * GREATEST_CHART
    packing.resolution, packing.padding, packing.bruteForce = LAYOUT_SIDE, PADDING, True
    atlas.generate(charts, packing)
    vertex, faces, uv = atlas.get_mesh(0)
    # xatlas measures along both sides of its rectangle, which is about a square: texels are square on ours.
    side = np.array([atlas.width, atlas.height], np.float32)
    return Atlas(vertex.astype(np.int64), faces.astype(np.int32), (uv * side / side.max()).astype(np.float32), atlas.chart_count)


def bake(surface: Surface, atlas: Atlas, size: int) -> Texture:
    """Ask for the colour of each texel's centre on the surface, and fill the rest of the picture by the nearest of them.

    Filters and mip-maps mix what is beyond a chart's edge in: there is more of the edge's own colour.

    Args:
        surface: that was unwrapped.
        atlas: of it.
        size: height and width of the picture, texels.
    """
    from scipy.ndimage import distance_transform_edt

    picture, covered = np.zeros((size * size, 3), np.uint8), np.zeros(size * size, bool)
    corners = surface.vertices[atlas.vertex][atlas.faces]
    for face, texel, weights in fragments(atlas.uv[atlas.faces] * size, size, size):
        points = (corners[face] * weights[..., None]).sum(1)
        picture[texel] = (surface.colors_at(points) * 255).round()
        covered[texel] = True
    covered, picture = covered.reshape(size, size), picture.reshape(size, size, 3)
    rows, columns = distance_transform_edt(~covered, return_distances=False, return_indices=True)
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1).sum() / 2
    return Texture(atlas, picture[rows, columns], float(covered.mean()), float(np.sqrt(covered.sum() / area)))
