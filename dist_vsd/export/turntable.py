"""Pictures of particles: single views, grids, and turntables as PNG, GIF and MP4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.image_files import tile, write_gif, write_mp4, write_png
from dist_vsd.particles.channels import picture_of
from dist_vsd.particles.particle import Particle

FRAMES_PER_SECOND = 20.0
STRIP_FRAMES = 8


@torch.no_grad()
def render_views(
    particle: Particle, cameras: Cameras, size: int, decode: Callable[[Tensor], Tensor] | None = None, channel: str = "color"
) -> Tensor:
    """Render a particle from each camera, one at a time to bound memory.

    Args:
        particle: to look at.
        cameras: B of them.
        size: height and width, pixels; a latent particle has the size that its prior decodes to.
        decode: from x_0 to a picture, for latent particles.
        channel: of particles/channels.py, that the particle shows.

    Returns:
        (B, 3, size, size) in [0, 1] on the CPU.
    """
    each = [cameras[i : i + 1] for i in range(len(cameras))]
    images = [picture_of(particle.render(one, size), channel, one) for one in each]
    if particle.is_latent:
        assert decode is not None
        images = [decode(image) for image in images]
    return torch.cat([image.cpu() for image in images]).clamp(0, 1)


def write_turntable(frames: Tensor, stem: Path) -> list[Path]:
    """Write the frames of one turn as ``stem``.gif, .mp4 and .png (a strip of STRIP_FRAMES of them).

    Args:
        frames: (B, 3, H, W), evenly spaced in azimuth.
        stem: path without an extension.

    Returns:
        The files.
    """
    files = [stem.with_name(stem.name + extension) for extension in (".gif", ".mp4", ".png")]
    write_gif(frames, files[0], FRAMES_PER_SECOND)
    write_mp4(frames, files[1], FRAMES_PER_SECOND)
    count = min(STRIP_FRAMES, len(frames))
    write_png(tile([frames[[i * len(frames) // count for i in range(count)]]]), files[2])
    return files


def write_grid(rows: list[Tensor], file: Path) -> Path:
    """Write a PNG with a row for each particle and a column for each camera."""
    write_png(tile(rows), file)
    return file
