"""Pictures on disk: PNG, GIF and MP4 from (B, 3, H, W) tensors in [0, 1]."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from torch import Tensor


def to_bytes(images: Tensor) -> np.ndarray:
    """Convert (B, 3, H, W) in [0, 1] to (B, H, W, 3) uint8."""
    return (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def enlarge(images: Tensor, factor: int) -> Tensor:
    """Repeat the pixels of (B, 3, H, W) images ``factor`` times along both axes."""
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def tile(rows: list[Tensor]) -> Tensor:
    """Lay out images as a grid.

    Args:
        rows: R tensors of (C, 3, H, W).

    Returns:
        (1, 3, R*H, C*W).
    """
    return torch.cat([torch.cat(list(row), -1) for row in rows], -2)[None]


def write_png(image: Tensor, file: Path) -> None:
    """Write a (1, 3, H, W) image."""
    file.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(file, to_bytes(image)[0], extension=".png")


def write_picture(picture: np.ndarray, file: Path) -> None:
    """Write an (H, W, 3) uint8 picture as PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(file, picture, extension=".png")


def write_gif(frames: Tensor, file: Path, frames_per_second: float) -> None:
    """Write (B, 3, H, W) frames as an endless GIF."""
    file.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(file, to_bytes(frames), extension=".gif", duration=1000 / frames_per_second, loop=0)


def write_mp4(frames: Tensor, file: Path, frames_per_second: float) -> None:
    """Write (B, 3, H, W) frames as H.264 in MP4; odd sizes are padded by a pixel, as the codec wants even ones."""
    file.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames.shape[-2:]
    frames = torch.nn.functional.pad(frames, (0, width % 2, 0, height % 2), value=1.0)
    iio.imwrite(
        file, to_bytes(frames), extension=".mp4", plugin="FFMPEG", fps=frames_per_second, codec="libx264",
        macro_block_size=2, ffmpeg_log_level="error",
    )  # fmt: skip
