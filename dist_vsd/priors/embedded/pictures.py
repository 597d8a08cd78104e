"""Pictures to train on: shards of random subjects, rendered once and kept as uint8 on disk.

A shard depends on the seed and its index alone, so a run that was cut off renders only the shards that are missing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_vsd.cameras import look_at_origin, uniform
from dist_vsd.priors.embedded.captions import Subject
from dist_vsd.priors.embedded.render import render_object
from dist_vsd.priors.embedded.scenes import COLORS, NUM_PROPORTIONS, OBJECTS

IMAGE_SIZE = 64
SHARD_SIZE = 768  # a multiple of the number of objects
DISTANCE_RANGE = (2.6, 3.2)
FOV_DEG_RANGE = (36.0, 46.0)
ELEVATION_DEG_RANGE = (-10.0, 45.0)
HIGH_ELEVATION_DEG_RANGE = (45.0, 80.0)
HIGH_ELEVATION_SHARE = 0.15


@dataclasses.dataclass(frozen=True)
class Pictures:
    """N pictures and what they show.

    Attributes:
        images: (N, 3, 64, 64) uint8.
        subjects: what each shows.
    """

    images: Tensor
    subjects: list[Subject]

    def __len__(self) -> int:
        return len(self.subjects)

    def batch(self, indices: Tensor, mirrored: Tensor) -> Tensor:
        """Return (B, 3, 64, 64) images in [0, 1], those flagged in ``mirrored`` (B,) left-right reversed.

        The scenes are symmetric in y and so is their light: a mirrored picture is the same subject at minus its azimuth,
        with the same caption (to the rounding of normals at sharp edges).
        """
        images = self.images[indices].float() / 255.0
        return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def render_shard(seed: int, shard: int) -> Pictures:
    """Draw and render SHARD_SIZE pictures, as many of each object; the same for the same seed and shard."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + shard)
    images, subjects = [], []
    for name in OBJECTS:
        count = SHARD_SIZE // len(OBJECTS)
        azimuth = uniform(-180.0, 180.0, count, generator)
        high = torch.rand(count, generator=generator) < HIGH_ELEVATION_SHARE
        elevation = torch.where(
            high, uniform(*HIGH_ELEVATION_DEG_RANGE, count, generator), uniform(*ELEVATION_DEG_RANGE, count, generator)
        )
        distance, fov = uniform(*DISTANCE_RANGE, count, generator), uniform(*FOV_DEG_RANGE, count, generator)
        proportions = torch.rand(count, NUM_PROPORTIONS, generator=generator) * 2 - 1
        colors = [list(COLORS)[i] for i in torch.randint(len(COLORS), (count,), generator=generator).tolist()]
        cameras = look_at_origin(azimuth, elevation, distance, fov)
        images.append((render_object(name, colors, proportions, cameras, IMAGE_SIZE) * 255).round().to(torch.uint8))
        pose = zip(colors, azimuth.tolist(), elevation.tolist(), strict=True)
        subjects += [Subject(name, color, a, e) for color, a, e in pose]
    return Pictures(torch.cat(images), subjects)


def _shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard_{shard:04d}.safetensors"


def write_shard(folder: Path, seed: int, shard: int) -> None:
    """Render a shard into ``folder`` unless it is there already."""
    file = _shard_file(folder, shard)
    if file.exists():
        return
    pictures = render_shard(seed, shard)
    folder.mkdir(parents=True, exist_ok=True)
    subjects = json.dumps([dataclasses.asdict(s) for s in pictures.subjects])
    temporary = file.with_suffix(".tmp")
    save_file({"images": pictures.images}, temporary, metadata={"subjects": subjects})
    temporary.rename(file)


def read_shards(folder: Path, shards: Iterable[int]) -> Pictures:
    """Read shards written by write_shard."""
    from safetensors import safe_open

    images, subjects = [], []
    for shard in shards:
        file = _shard_file(folder, shard)
        images.append(load_file(file)["images"])
        with safe_open(file, "pt") as opened:
            subjects += [Subject(**s) for s in json.loads(opened.metadata()["subjects"])]
    return Pictures(torch.cat(images), subjects)
