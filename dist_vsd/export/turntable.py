"""Pictures of particles: single views, grids, and turntables as PNG, GIF and MP4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras, turntable
from dist_vsd.config import CameraConfig, RunConfig
from dist_vsd.image_files import tile, write_gif, write_mp4, write_png
from dist_vsd.particles.channels import picture_of
from dist_vsd.particles.particle import Particle

FRAMES_PER_SECOND = 20.0
STRIP_FRAMES = 8
NUM_FRAMES, ELEVATION_DEG, LEAST_PIXELS = 40, 15.0, 128  # of a turn, if nobody says
KINDS = ("gif", "mp4", "png")


def training_turn(camera: CameraConfig, num_views: int = NUM_FRAMES) -> Cameras:
    """Return a turn at the distance and with the field of view in the middle of the training cameras'."""
    return turntable(num_views, ELEVATION_DEG, sum(camera.distance) / 2, sum(camera.fov_deg) / 2)


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


def write_turn(
    theta: Particle,
    config: RunConfig,
    decode: Callable[[Tensor], Tensor] | None,
    folder: Path,
    particle: int,
    kinds: Sequence[str] = KINDS,
) -> list[Path]:
    """Write a turn of a particle, turntable_0000.gif and so on, or the picture of a flat one, picture_0000.png.

    Args:
        theta: the particle.
        config: of its run.
        decode: from x_0 to a picture, for latent particles.
        folder: for the files.
        particle: its id.
        kinds: out of KINDS.

    Returns:
        The files.
    """
    device = next(theta.parameters()).device
    cameras = training_turn(config.camera, 1 if config.is_flat else NUM_FRAMES).to(device)
    frames = render_views(theta, cameras, max(LEAST_PIXELS, config.render_size), decode)
    if not config.is_flat:
        return write_turntable(frames, folder / f"turntable_{particle:04d}", kinds)
    file = folder / f"picture_{particle:04d}.png"
    write_png(frames, file)
    return [file]


def write_turntable(frames: Tensor, stem: Path, kinds: Sequence[str] = KINDS) -> list[Path]:
    """Write the frames of one turn as ``stem``.gif, .mp4 and .png (a strip of STRIP_FRAMES of them).

    Args:
        frames: (B, 3, H, W), evenly spaced in azimuth.
        stem: path without an extension.
        kinds: which of them.

    Returns:
        The files.
    """
    count = min(STRIP_FRAMES, len(frames))
    writers = {
        "gif": lambda file: write_gif(frames, file, FRAMES_PER_SECOND),
        "mp4": lambda file: write_mp4(frames, file, FRAMES_PER_SECOND),
        "png": lambda file: write_png(tile([frames[[i * len(frames) // count for i in range(count)]]]), file),
    }
    files = {kind: stem.with_name(f"{stem.name}.{kind}") for kind in kinds}
    for kind, file in files.items():
        writers[kind](file)
    return list(files.values())


def write_grid(rows: list[Tensor], file: Path) -> Path:
    """Write a PNG with a row for each particle and a column for each camera."""
    write_png(tile(rows), file)
    return file
