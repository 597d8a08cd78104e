"""Small turntables for the page of results: one WebP picture a run, a row for each particle and a column for each frame.

A strip can be turned, paused and shown in step with others, which an animated picture can't; and it is decoded once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
from pathlib import Path

import imageio.v3 as iio
from PIL import Image, ImageSequence

NUM_FRAMES, SIZE, MOST_PARTICLES, QUALITY = 16, 112, 4, 72
# Sizes stand in the name, so that a later version with others doesn't take an older file for its own.
CACHE_FILE = f"preview_{NUM_FRAMES}x{SIZE}.webp"
# What an unfinished or damaged picture raises, by its kind.
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preview:
    """A strip of small frames.

    Attributes:
        webp: the picture.
        num_frames: columns, evenly spaced in azimuth.
        num_particles: rows; at most MOST_PARTICLES.
        of_particles: how many the run has pictures of.
    """

    webp: bytes
    num_frames: int
    num_particles: int
    of_particles: int


def preview_of(run_dir: Path) -> Preview | None:
    """Return the preview of a run, kept in its export folder; None for a run without any picture yet.

    It is made of the turntables in export/, or of the newest grid in renders/ while there are none.
    """
    turntables, grid = _turntables(run_dir / "export"), _newest_grid(run_dir / "renders")
    sources = turntables or ([grid] if grid else [])
    if not sources:
        return None
    cache = run_dir / "export" / CACHE_FILE
    with contextlib.suppress(*_UNREADABLE):
        if cache.stat().st_mtime_ns >= max(file.stat().st_mtime_ns for file in sources):
            webp = cache.read_bytes()
            with Image.open(io.BytesIO(webp)) as strip:
                rows = strip.height // SIZE
                return Preview(
                    webp=webp, num_frames=strip.width // SIZE, num_particles=rows, of_particles=max(rows, len(turntables) or rows)
                )
    try:
        rows = [_frames_of_turntable(file) for file in turntables[:MOST_PARTICLES]] if turntables else _rows_of_grid(sources[0])
    except _UNREADABLE:
        return None
    num_frames = min(len(row) for row in rows)
    webp = _strip([_evenly(row, num_frames) for row in rows[:MOST_PARTICLES]])
    _keep(cache, webp)
    return Preview(
        webp=webp, num_frames=num_frames, num_particles=min(len(rows), MOST_PARTICLES), of_particles=max(len(rows), len(turntables))
    )


def _turntables(export: Path) -> list[Path]:
    """Return the file of each particle's turntable that is read fastest."""
    best: dict[str, Path] = {}
    for extension in ("mp4", "png", "gif"):
        best |= {file.stem: file for file in export.glob(f"turntable_*.{extension}")}
    return [best[stem] for stem in sorted(best)]


def _newest_grid(renders: Path) -> Path | None:
    """Return the newest grid that shows particle 0 (evaluation/preview.py)."""
    return max(renders.glob("update_*_particles_0000-*.png"), default=None, key=lambda file: file.name)


def _frames_of_turntable(file: Path) -> list[Image.Image]:
    """Read a turntable's frames, NUM_FRAMES of them or all that there are."""
    if file.suffix == ".png":  # frames side by side
        with Image.open(file) as strip:
            return _evenly(_cells(strip.convert("RGB"), strip.height)[0], NUM_FRAMES)
    if file.suffix == ".mp4":
        return _evenly([Image.fromarray(frame) for frame in iio.imread(file, plugin="FFMPEG")], NUM_FRAMES)
    with Image.open(file) as animation:
        return _evenly([_small(frame.convert("RGB")) for frame in ImageSequence.Iterator(animation)], NUM_FRAMES)


def _rows_of_grid(file: Path) -> list[list[Image.Image]]:
    first, last = map(int, re.findall(r"\d+", file.stem)[-2:])
    with Image.open(file) as grid:
        return _cells(grid.convert("RGB"), grid.height // (last - first + 1))


def _cells(picture: Image.Image, size: int) -> list[list[Image.Image]]:
    return [
        [picture.crop((x, y, x + size, y + size)) for x in range(0, picture.width - size + 1, size)]
        for y in range(0, picture.height - size + 1, size)
    ]


def _evenly(frames: list[Image.Image], count: int) -> list[Image.Image]:
    if not frames:
        raise ValueError("a turntable without frames")
    count = min(count, len(frames))
    return [frames[i * len(frames) // count] for i in range(count)]


def _small(frame: Image.Image) -> Image.Image:
    return frame if frame.size == (SIZE, SIZE) else frame.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def _strip(rows: list[list[Image.Image]]) -> bytes:
    strip = Image.new("RGB", (SIZE * len(rows[0]), SIZE * len(rows)))
    for y, row in enumerate(rows):
        for x, frame in enumerate(row):
            strip.paste(_small(frame), (SIZE * x, SIZE * y))
    encoded = io.BytesIO()
    strip.save(encoded, "WEBP", quality=QUALITY, method=3)
    return encoded.getvalue()


def _keep(cache: Path, webp: bytes) -> None:
    """Keep a preview for the next time; a run directory that can't be written loses only that."""
    temporary = cache.with_name(f".{cache.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        cache.parent.mkdir(exist_ok=True)
        temporary.write_bytes(webp)
        temporary.replace(cache)
