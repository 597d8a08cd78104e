"""Cameras: where they stand, the rays that they cast and the words that say from where they look.

Conventions, used everywhere: z is up, the front of an object faces +x, azimuth 0 looks at the front and grows towards
+y, elevation is the angle above the horizon. Camera axes are OpenGL's: x right, y up, looking along -z. Degrees in
configuration and in this module's arguments named ``*_deg``; radians in code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Cameras:
    """A batch of B pinhole cameras.

    Attributes:
        c2w: (B, 4, 4) camera-to-world matrices.
        fov: (B,) vertical field of view, radians.
        azimuth_deg: (B,) degrees in [-180, 180).
        elevation_deg: (B,) degrees in [-90, 90].
    """

    c2w: Tensor
    fov: Tensor
    azimuth_deg: Tensor
    elevation_deg: Tensor

    def __len__(self) -> int:
        return self.c2w.shape[0]

    def __getitem__(self, index: slice | list[int]) -> Cameras:
        """Return the cameras of an index, as a batch."""
        return Cameras(self.c2w[index], self.fov[index], self.azimuth_deg[index], self.elevation_deg[index])

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Cameras:
        """Return the same cameras on a device."""
        return Cameras(*(getattr(self, f.name).to(device, dtype) for f in dataclasses.fields(self)))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the fields, which ``of_tensors`` takes."""
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self))

    @staticmethod
    def of_tensors(tensors: Sequence[Tensor]) -> Cameras | None:
        """Return the cameras of ``tensors()``; None of nothing."""
        return Cameras(*tensors) if tensors else None

    def dropped(self) -> Cameras:
        """Return zeros instead, which say to a prior that knows cameras that there is none."""
        return Cameras(*map(torch.zeros_like, self.tensors()))

    @staticmethod
    def none(count: int, device: torch.device | str = "cpu") -> Cameras:
        """Return ``count`` of the zeros of ``dropped``."""
        nothing = torch.zeros(count, device=device)
        return Cameras(torch.zeros(count, 4, 4, device=device), nothing, nothing, nothing)

    @staticmethod
    def cat(batches: list[Cameras]) -> Cameras:
        """Join batches of cameras into one."""
        return Cameras(*(torch.cat([getattr(b, f.name) for b in batches]) for f in dataclasses.fields(Cameras)))


def look_at_origin(azimuth_deg: Tensor, elevation_deg: Tensor, distance: Tensor, fov_deg: Tensor) -> Cameras:
    """Place cameras on spheres around the origin, looking at it, with z up.

    Args:
        azimuth_deg: (B,) degrees; 0 is in front of the object (+x), 90 on its left (+y).
        elevation_deg: (B,) degrees above the horizon.
        distance: (B,) distance to the origin, in scene units.
        fov_deg: (B,) vertical field of view, degrees.

    Returns:
        B cameras.
    """
    azimuth, elevation = torch.deg2rad(azimuth_deg), torch.deg2rad(elevation_deg)
    backward = torch.stack(
        [torch.cos(elevation) * torch.cos(azimuth), torch.cos(elevation) * torch.sin(azimuth), torch.sin(elevation)], -1
    )
    # The up vector is the derivative of `backward` by elevation: it exists at the poles too, unlike a cross product with z.
    up = torch.stack(
        [-torch.sin(elevation) * torch.cos(azimuth), -torch.sin(elevation) * torch.sin(azimuth), torch.cos(elevation)], -1
    )
    right = torch.linalg.cross(up, backward)
    c2w = torch.zeros(azimuth.shape[0], 4, 4, dtype=backward.dtype, device=backward.device)
    c2w[:, :3, 0], c2w[:, :3, 1], c2w[:, :3, 2] = right, up, backward
    c2w[:, :3, 3] = backward * distance[:, None]
    c2w[:, 3, 3] = 1.0
    wrapped = torch.remainder(azimuth_deg + 180.0, 360.0) - 180.0
    return Cameras(c2w, torch.deg2rad(fov_deg), wrapped, elevation_deg)


def uniform(low: float, high: float, count: int, generator: torch.Generator) -> Tensor:
    """Draw (count,) numbers from U[low, high)."""
    return low + (high - low) * torch.rand(count, generator=generator)


def turntable(num_views: int, elevation_deg: float, distance: float, fov_deg: float) -> Cameras:
    """Return ``num_views`` cameras evenly spaced in azimuth, the first one in front.

    Args:
        num_views: B, at least 1.
        elevation_deg: degrees above the horizon, shared by all.
        distance: distance to the origin, scene units.
        fov_deg: vertical field of view, degrees.
    """
    if num_views < 1:
        raise ValueError(f"a turntable needs at least 1 view, got {num_views}: raise --num-views")
    azimuth = torch.arange(num_views) * (360.0 / num_views)
    constant = torch.ones(num_views)
    return look_at_origin(azimuth, elevation_deg * constant, distance * constant, fov_deg * constant)


def cast_rays(cameras: Cameras, height: int, width: int, jitter: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cast one ray through every pixel.

    Args:
        cameras: B cameras.
        height, width: image size in pixels.
        jitter: (B, H, W, 2) offsets within a pixel in [0, 1), or None for pixel centres.

    Returns:
        origins and unit directions, (B, H*W, 3) each, pixels row by row from the top left.
    """
    device, dtype = cameras.c2w.device, cameras.c2w.dtype
    rows = torch.arange(height, device=device, dtype=dtype)[:, None].expand(height, width)
    columns = torch.arange(width, device=device, dtype=dtype)[None, :].expand(height, width)
    offsets = torch.stack([rows, columns], -1)[None] + (0.5 if jitter is None else jitter.to(dtype))
    half_height = torch.tan(cameras.fov / 2)[:, None, None]
    y = (1.0 - 2.0 * offsets[..., 0] / height) * half_height
    x = (2.0 * offsets[..., 1] / width - 1.0) * half_height * (width / height)
    directions_camera = torch.stack([x, y, -torch.ones_like(x)], -1).reshape(x.shape[0], -1, 3)
    directions = directions_camera @ cameras.c2w[:, :3, :3].transpose(1, 2)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    return cameras.c2w[:, None, :3, 3].expand_as(directions), directions
