"""What a render shows, as pictures that people look at: colours, normals, depth, opacity."""

from __future__ import annotations

from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.particles.particle import Render

SHOWN_RADIUS = 1.0  # scene units: depths are told apart from the camera's distance to the origin less this to as much more


def picture_of(render: Render, channel: str, cameras: Cameras) -> Tensor:
    """Return one channel of a render as (B, 3, H, W) in [0, 1] or a little beyond, or x_0 for the colours of a latent particle.

    Normals are as color_normals has them (normal_maps.py). Depth is black SHOWN_RADIUS before the origin and white as far behind it, on
    white; opacity is black where nothing is and white where a ray does not get through.

    Args:
        render: of B cameras, of a representation that shows the channel.
        channel: one of representations.CHANNELS.
        cameras: B, from which it was rendered.
    """
    if channel in ("color", "normal"):
        return render.channel(channel)
    if channel == "opacity":
        return render.opacity.expand(-1, 3, -1, -1)
    assert render.depth is not None, "a representation that shows no depth"
    nearest = (cameras.c2w[:, :3, 3].norm(dim=-1) - SHOWN_RADIUS).view(-1, 1, 1, 1)
    shade = ((render.depth - nearest) / (2 * SHOWN_RADIUS)).clamp(0, 1)
    return (render.opacity * shade + 1 - render.opacity).expand(-1, 3, -1, -1)
