"""From a browser's camera to ours, and how a picture that is not square is cut out of a square render."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dist_vsd.cameras import Cameras, turntable
from dist_vsd.config import CameraConfig

OPENCV_TO_OPENGL = (1.0, -1.0, -1.0)  # viser's camera has y down and looks along z; ours has y up and looks along -z
ELEVATION_DEG = 15.0  # of the camera to begin with


def to_camera(position: Sequence[float], wxyz: Sequence[float], fov: float) -> Cameras:
    """Return a browser's camera as a batch of one of ours; the world's axes are the same (z up, front +x).

    Args:
        position: (3,) scene units.
        wxyz: (4,) quaternion from the camera's axes (OpenCV's: x right, y down, z forwards) to the world's.
        fov: vertical field of view, radians.
    """
    w, x, y, z = (torch.tensor([float(value) for value in wxyz]) / math.dist(tuple(map(float, wxyz)), (0, 0, 0, 0))).tolist()
    rotation = torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    c2w = torch.eye(4)
    c2w[:3, :3] = rotation * torch.tensor(OPENCV_TO_OPENGL)
    c2w[:3, 3] = torch.tensor([float(value) for value in position])
    px, py, pz = c2w[:3, 3].tolist()
    azimuth, elevation = math.degrees(math.atan2(py, px)), math.degrees(math.atan2(pz, math.hypot(px, py)))
    azimuth = -180.0 if azimuth == 180.0 else azimuth
    return Cameras(c2w[None], torch.tensor([float(fov)]), torch.tensor([azimuth]), torch.tensor([elevation]))


def square_around(camera: Cameras, height: int, width: int) -> tuple[Cameras, int]:
    """Return the camera and the size of the square render whose middle height x width pixels are to be shown.

    Args:
        camera: whose field of view is that of the shorter side, so that what stands in the middle is whole in narrow pictures too.
        height, width: even numbers, so that the middle lies on pixels.
    """
    size = max(height, width)
    fov = 2 * torch.atan(torch.tan(camera.fov / 2) * (size / min(height, width)))
    return Cameras(camera.c2w, fov, camera.azimuth_deg, camera.elevation_deg), size


def even_size(height: float, aspect: float) -> tuple[int, int]:
    """Return even numbers of pixels, at least 2, near a height and ``aspect`` times as wide."""
    return 2 * max(1, round(height / 2)), 2 * max(1, round(height * aspect / 2))


def start_position(camera: CameraConfig) -> tuple[float, float, float]:
    """Return where a camera stands before the front, at the middle of training's distances."""
    x, y, z = turntable(1, ELEVATION_DEG, sum(camera.distance) / 2, 40.0).c2w[0, :3, 3].tolist()
    return x, y, z
