"""A texture for a surface: the colour of each texel of an atlas asked of the particle."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from dist_vsd.export.atlas import areas, texels
from dist_vsd.export.mesh_pictures import Colors
from dist_vsd.export.surface import Atlas, Surface


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


def bake(surface: Surface, atlas: Atlas, size: int) -> Texture:
    """Ask for the colour of each texel's centre on the surface, and fill the rest of the picture by the nearest of them.

    Filters and mip-maps mix what is beyond a chart's edge in: there is more of the edge's own colour.

    Args:
        surface: to be seen.
        atlas: of it.
        size: height and width of the picture, texels.
    """
    from scipy.ndimage import distance_transform_edt

    picture, covered = np.zeros((size * size, 3), np.uint8), np.zeros(size * size, bool)
    corners = surface.vertices[atlas.vertex][atlas.faces]
    for texel, face, weights in texels(atlas, size):
        points = (corners[face] * weights[..., None]).sum(1)
        picture[texel] = (surface.colors_at(points) * 255).round()
        covered[texel] = True
    covered, picture = covered.reshape(size, size), picture.reshape(size, size, 3)
    rows, columns = distance_transform_edt(~covered, return_distances=False, return_indices=True)
    texels_per_unit = float(np.sqrt(covered.sum() / areas(corners).sum()))
    return Texture(atlas, picture[rows, columns], float(covered.mean()), texels_per_unit)
