"""A camera as a prior that knows cameras is told of it."""

from __future__ import annotations

from torch import Tensor, nn

from dist_vsd.cameras import Cameras

POSE_WIDTH = 16


def camera_pose(cameras: Cameras) -> Tensor:
    """Return (B, POSE_WIDTH) poses: camera-to-world matrices, flattened, their translation at unit length (MVDream, Shi et al. 2023, section 3.2).

    So the pose says from which side, and not from how far. Cameras that are dropped, all zeros, have zeros.
    """
    c2w = cameras.c2w.clone()
    c2w[:, :3, 3] = nn.functional.normalize(c2w[:, :3, 3], dim=1)
    return c2w.flatten(1)
