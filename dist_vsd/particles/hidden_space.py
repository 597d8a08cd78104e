"""What no camera sees of a radiance field: the inside of its walls.

A field is free to be an opaque skin around nothing, with a hole where no camera looks, as a house without a floor. As a solid, what
nobody sees is inside.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.particles.iso_level import samples_along_rays, views_of_cube
from dist_vsd.particles.radiance_field import RadianceField

# From just below the ground, as cameras are trained, to straight above, from where one sees into a cup.
TURNS_DEG = ((-10.0, 12), (15.0, 12), (40.0, 12), (65.0, 8), (90.0, 1))
VIEW_PIXELS, CHUNK_POINTS = 96, 1 << 20
# A point is seen where at least so much of the light comes through. A field's walls may be fog that is opaque only as a whole, white before
# white: half of the light reaches their inside, and they would be hollowed out.
LEAST_LIGHT = 0.95


@torch.no_grad()
def hidden_space(field: RadianceField, volume: Tensor, points: Tensor) -> Tensor:
    """Say which points are hidden from all of TURNS_DEG's cameras: less than LEAST_LIGHT comes through to them.

    Args:
        field: the particle, whose origin is not tracked.
        volume: its ``density_volume``, on its device.
        points: (N, 3), on its device.

    Returns:
        (N,) bool.
    """
    hidden = torch.ones(len(points), dtype=torch.bool, device=points.device)
    views = views_of_cube(field, TURNS_DEG)
    for view in range(len(views)):
        camera = views[view : view + 1]
        reach = _farthest_around(reach_of_rays(field, volume, camera))
        for chunk in hidden.nonzero().squeeze(-1).split(CHUNK_POINTS):  # those that no camera has seen so far
            pixel, distance = seen_from(camera, points[chunk])
            hidden[chunk] = distance > reach[pixel]
    return hidden


def _farthest_around(reach: Tensor) -> Tensor:
    """Return for each pixel the farthest that a ray gets there or next to it: a slanting surface is at many depths within one."""
    return torch.nn.functional.max_pool2d(reach.view(1, VIEW_PIXELS, VIEW_PIXELS), 3, stride=1, padding=1).flatten()


def reach_of_rays(field: RadianceField, volume: Tensor, camera: Cameras) -> Tensor:
    """Return how far the rays of a camera get with LEAST_LIGHT, scene units; (VIEW_PIXELS^2,), inf where they cross the cube with more."""
    reach = volume.new_full((VIEW_PIXELS**2,), math.inf)
    for rays, t, density in samples_along_rays(field, volume, camera, VIEW_PIXELS):
        step = (t[:, 1] - t[:, 0])[:, None]
        is_dark = (density * step).cumsum(-1) > -math.log(LEAST_LIGHT)
        first = is_dark.int().argmax(-1, keepdim=True)
        reach[rays] = torch.where(is_dark.any(-1), t.gather(-1, first).squeeze(-1), math.inf)
    return reach


def seen_from(camera: Cameras, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of the pixel at which a camera sees each of (N, 3) points, and their distances from it; (N,) both."""
    local = (points - camera.c2w[0, :3, 3]) @ camera.c2w[0, :3, :3]
    x, y = (local[:, :2] / (-local[:, 2:] * torch.tan(camera.fov / 2))).unbind(-1)
    column, row = (((side + 1) / 2 * VIEW_PIXELS).long().clamp(0, VIEW_PIXELS - 1) for side in (x, -y))
    return row * VIEW_PIXELS + column, local.norm(dim=-1)
