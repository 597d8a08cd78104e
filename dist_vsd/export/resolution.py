"""How finely a field is to be sampled for its surface, if nobody says."""

from __future__ import annotations

import dataclasses
import math

from dist_vsd.config import RunConfig
from dist_vsd.particles.iso_level import VOLUME_BYTES
from dist_vsd.particles.radiance_field import RadianceField

CELLS_OF_A_DETAIL = 2  # by the sampling theorem
# Points at which a field is asked: some ten seconds of one CPU core with a dense grid. A GPU asks more.
MOST_POINTS = {"cpu": 2**23, "cuda": 2**28}
MOST_SIDE, LEAST_SIDE = 512, 16  # the former has about a million vertices, with which browsers still turn a mesh


@dataclasses.dataclass(frozen=True)
class Resolution:
    """Cells a side of the sampled cube, and why so many."""

    cells: int
    why: str


def suitable_resolution(field: RadianceField, config: RunConfig, free_bytes: int) -> Resolution:
    """Choose a resolution: two cells for each detail that the field can have, as far as points, memory and viewers allow.

    A detail is no smaller than a cell of the encoding's finest grid, nor than a pixel of the pictures that it was optimised by.
    Points count where the occupancy grid is not empty: an object that fills little of the cube is sampled more finely.

    Args:
        field: the particle, on its device.
        config: of its run.
        free_bytes: of memory.
    """
    details = [
        (field.encoding.finest_resolution, "vertices a side of its finest grid"),
        (pixels_across(config), "pixels that its training pictures have across the cube"),
    ]
    count, named = min(details)
    share, device = float(field.occupancy.binaries.float().mean()), next(field.parameters()).device.type
    points = MOST_POINTS.get(device, MOST_POINTS["cpu"])
    choices = [
        (CELLS_OF_A_DETAIL * count, f"{CELLS_OF_A_DETAIL} cells for each of the {count} {named}"),
        (int((points / max(share, 1e-6)) ** (1 / 3)), f"{points:,} points in the {share:.0%} of the cube that is not empty"),
        (int((free_bytes / 2 / VOLUME_BYTES) ** (1 / 3)), "half of the free memory"),
        (MOST_SIDE, "more would make a mesh too large for viewers"),
    ]
    return Resolution(*max(min(choices), (LEAST_SIDE, "fewer show nothing")))


def pixels_across(config: RunConfig) -> int:
    """Return how many pixels of the nearest, narrowest training camera lie across the field's cube."""
    pixel = 2 * config.camera.distance[0] * math.tan(math.radians(config.camera.fov_deg[0]) / 2) / config.render_size
    return max(1, round(2 * config.field.bound / pixel))
