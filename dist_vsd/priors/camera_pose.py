"""A camera as a prior that knows cameras is told of it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from dist_vsd.cameras import Cameras

# MVDream's world: the front faces -y, and azimuth 90 is +x; here the front faces +x, and azimuth 90 is +y. z is up in both.
MVDREAM_WORLD = ((0.0, 1.0, 0.0, 0.0), (-1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))


def camera_pose(cameras: Cameras, world: Tensor | None = None) -> Tensor:
    """Return (B, 16) poses: camera-to-world matrices, flattened, their translation at unit length.

    As MVDream's (Shi et al. 2023, section 3.2; its own code normalises the translation): so the pose says from
    which side, and not from how far. Cameras that are dropped, all zeros, have zeros.

    Args:
        cameras: B of them.
        world: (4, 4) from this program's world to the one that the prior was trained in; None: the same.
    """
    if world is not None:
        cameras = dataclasses.replace(cameras, c2w=world.to(cameras.c2w) @ cameras.c2w)
    axes, translation = cameras.c2w[..., :3], cameras.c2w[..., 3]
    unit = torch.cat([nn.functional.normalize(translation[:, :3], dim=1), translation[:, 3:]], 1)
    return torch.cat([axes, unit[..., None]], 2).flatten(1)
