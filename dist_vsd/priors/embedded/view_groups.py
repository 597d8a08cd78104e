"""Groups of views to train the multi-view prior on: one object from four sides, rendered and encoded once, kept on disk as latents.

A group's views share elevation, distance and field of view, and lie a quarter turn apart from a random azimuth on, as the cameras of a
shot do (training/draws.py). A shard depends on the seed, its index and the VAE alone, so a run that was cut off makes only those that
are missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dist_vsd.cameras import Cameras, look_at_origin, uniform
from dist_vsd.priors.embedded.captions import Subject, caption
from dist_vsd.priors.embedded.pictures import (
    DISTANCE_RANGE,
    ELEVATION_DEG_RANGE,
    FOV_DEG_RANGE,
    HIGH_ELEVATION_DEG_RANGE,
    HIGH_ELEVATION_SHARE,
    IMAGE_SIZE,
)
from dist_vsd.priors.embedded.render import render_channels
from dist_vsd.priors.embedded.scenes import COLORS, NUM_PROPORTIONS, OBJECTS, WITH_A_FRONT
from dist_vsd.priors.pipeline_folder import VIEWS_TOGETHER
from dist_vsd.serialization import read_tensors, write_tensors

NORMAL_EVERY = 4  # groups, of which the first has normal maps too
SHARD_UNIT = 10  # groups of an object in a shard; those with a front are drawn twice as often
DROP_ALL, DROP_VIEW, DROP_COLOR = 0.10, 0.50, 0.20
DROP_CAMERA = 0.60  # of the empty captions: the unconditional branch of guidance knows neither text nor camera


@dataclasses.dataclass(frozen=True)
class ViewGroups:
    """N groups of VIEWS_TOGETHER views.

    Attributes:
        color: (N, V, 2, 4, h, w) fp16, posterior means and standard deviations of the shaded pictures, unscaled.
        normal: (N / NORMAL_EVERY, ...), the same of the normal maps of groups 0, NORMAL_EVERY, ...
        cameras: (N, 4): azimuth of the first view and elevation, degrees; distance, scene units; field of view, degrees.
        subjects: (name, colour) of each.
    """

    color: Tensor
    normal: Tensor
    cameras: Tensor
    subjects: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.subjects)


def cameras_of(drawn: Tensor) -> Cameras:
    """Return the G VIEWS_TOGETHER cameras of (G, 4) rows of ViewGroups.cameras, group by group."""
    azimuth_deg, elevation_deg, distance, fov_deg = drawn.repeat_interleave(VIEWS_TOGETHER, 0).unbind(1)
    quarter = torch.arange(VIEWS_TOGETHER).repeat(len(drawn)) * (360.0 / VIEWS_TOGETHER)
    return look_at_origin(azimuth_deg + quarter, elevation_deg, distance, fov_deg)


def draw_captions(subject: tuple[str, str], cameras: Cameras, medium: str | None, generator: torch.Generator) -> tuple[list[str], bool]:
    """Caption the views of a group, leaving out all, the views or the colour for all of them alike, and say whether the camera is dropped.

    A normal map is always called one: so the empty caption, which guidance steers away from, is of pictures.
    """
    drop_all, drop_view, drop_color, drop_camera = (
        torch.rand(4, generator=generator) < torch.tensor([DROP_ALL, DROP_VIEW, DROP_COLOR, DROP_CAMERA])
    ).tolist()
    if drop_all and medium is None:
        return [""] * len(cameras), drop_camera
    name, color = subject
    shown = [Subject(name, color, a, e) for a, e in zip(cameras.azimuth_deg.tolist(), cameras.elevation_deg.tolist(), strict=True)]
    return [caption(name, None if drop_color else color, None if drop_view else s.view, medium) for s in shown], False


def _draw_cameras(count: int, generator: torch.Generator) -> Tensor:
    high = torch.rand(count, generator=generator) < HIGH_ELEVATION_SHARE
    elevation = torch.where(
        high, uniform(*HIGH_ELEVATION_DEG_RANGE, count, generator), uniform(*ELEVATION_DEG_RANGE, count, generator)
    )
    azimuth = uniform(-180.0, 180.0, count, generator)
    return torch.stack([azimuth, elevation, uniform(*DISTANCE_RANGE, count, generator), uniform(*FOV_DEG_RANGE, count, generator)], 1)


@torch.no_grad()
def make_shard(seed: int, shard: int, vae: AutoencoderKL) -> ViewGroups:
    """Draw, render and encode a shard of groups, SHARD_UNIT of each object and twice as many of those with a front."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + shard)
    color, normal, cameras, subjects = [], [], [], []
    for name in OBJECTS:
        count = SHARD_UNIT * (2 if name in WITH_A_FRONT else 1)
        drawn = _draw_cameras(count, generator)
        proportions = torch.rand(count, NUM_PROPORTIONS, generator=generator) * 2 - 1
        colors = [list(COLORS)[i] for i in torch.randint(len(COLORS), (count,), generator=generator).tolist()]
        each = [color for color in colors for _ in range(VIEWS_TOGETHER)]
        shaded, normals = render_channels(name, each, proportions.repeat_interleave(VIEWS_TOGETHER, 0), cameras_of(drawn), IMAGE_SIZE)
        color.append(_encoded(vae, shaded))
        normal.append(normals.unflatten(0, (count, VIEWS_TOGETHER)))
        cameras.append(drawn)
        subjects += [(name, color) for color in colors]
    assert len(subjects) % NORMAL_EVERY == 0, "shards are joined, and group NORMAL_EVERY k has the normal maps k"
    chosen = torch.cat(normal)[::NORMAL_EVERY].flatten(0, 1)
    return ViewGroups(torch.cat(color), _encoded(vae, chosen), torch.cat(cameras), subjects)


def _encoded(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Return (G, V, 2, 4, h, w) posteriors of (G V, 3, H, W) images in [0, 1]."""
    posterior = vae.encode(images * 2 - 1).latent_dist
    return torch.stack([posterior.mean, posterior.std], 1).half().unflatten(0, (-1, VIEWS_TOGETHER))


def _shard_file(folder: Path, shard: int) -> Path:
    return folder / f"groups_{shard:04d}.safetensors"


def write_shard(folder: Path, seed: int, shard: int, vae_folder: Path) -> None:
    """Make a shard and write it into ``folder``, unless it is there already, with the VAE of a folder."""
    file = _shard_file(folder, shard)
    if file.exists():
        return
    vae = AutoencoderKL.from_pretrained(vae_folder, use_safetensors=True, local_files_only=True).float().eval()
    groups = make_shard(seed, shard, vae)
    folder.mkdir(parents=True, exist_ok=True)
    subjects = torch.tensor([[list(OBJECTS).index(name), list(COLORS).index(color)] for name, color in groups.subjects])
    write_tensors({"color": groups.color, "normal": groups.normal, "cameras": groups.cameras, "subjects": subjects}, file)


def read_shards(folder: Path, shards: Iterable[int]) -> ViewGroups:
    """Read shards written by write_shard."""
    tensors = [read_tensors(_shard_file(folder, shard)) for shard in shards]
    color, normal, cameras, subjects = (torch.cat([one[name] for one in tensors]) for name in ("color", "normal", "cameras", "subjects"))
    return ViewGroups(color, normal, cameras, [(list(OBJECTS)[i], list(COLORS)[j]) for i, j in subjects.tolist()])
