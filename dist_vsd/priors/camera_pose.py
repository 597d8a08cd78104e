"""A camera as a prior that knows cameras is told of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_vsd.cameras import Cameras


def camera_pose(cameras: Cameras) -> Tensor:
    """Return (B, 16) poses: camera-to-world matrices, flattened, their translation at unit length.

    As MVDream's (Shi et al. 2023, section 3.2; its own code normalises the translation): so the pose says from
    which side, and not from how far. Cameras that are dropped, all zeros, have zeros.
    """
    axes, translation = cameras.c2w[..., :3], cameras.c2w[..., 3]
    unit = torch.cat([nn.functional.normalize(translation[:, :3], dim=1), translation[:, 3:]], 1)
    return torch.cat([axes, unit[..., None]], 2).flatten(1)
