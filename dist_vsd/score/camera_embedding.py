"""The camera as a condition of eps_phi."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_vsd.cameras import Cameras

POSE_WIDTHS = {"c2w": 16, "spherical": 4, "none": 0}


def pose_of(cameras: Cameras, kind: str) -> Tensor:
    """Describe B cameras to phi.

    Args:
        cameras: B of them.
        kind: c2w (the flattened matrix, ProlificDreamer), spherical (elevation in radians, sine and cosine of the azimuth,
            distance; threestudio) or none.

    Returns:
        (B, POSE_WIDTHS[kind]); zeros stand for a pose that is dropped.
    """
    if kind == "c2w":
        return cameras.c2w.flatten(1)
    if kind == "none":
        return cameras.c2w.new_zeros(len(cameras), 0)
    azimuth, elevation = torch.deg2rad(cameras.azimuth_deg), torch.deg2rad(cameras.elevation_deg)
    return torch.stack([elevation, azimuth.sin(), azimuth.cos(), cameras.c2w[:, :3, 3].norm(dim=1)], 1)


class CameraEmbedding(nn.Module):
    """Map a camera pose to an offset of the UNet's time embedding: Linear, SiLU, Linear (ProlificDreamer, section 3.2).

    Deviation: the last layer starts at zero. In both public implementations it does not, so that their eps_phi differs
    from the pretrained model before the first step.

    Args:
        num_inputs: numbers of a pose.
        width: of the time embedding.
        generator: draws the first layer, on the CPU.
    """

    def __init__(self, num_inputs: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Linear(num_inputs, width)
        self.last = nn.Linear(width, width)
        with torch.no_grad():
            self.first.weight.copy_((torch.rand(width, num_inputs, generator=generator) * 2 - 1) / num_inputs**0.5)
            self.first.bias.zero_()
            self.last.weight.zero_()
            self.last.bias.zero_()

    def forward(self, pose: Tensor) -> Tensor:
        """Return (B, width) offsets for (B, num_inputs) poses (zeros for a dropped one)."""
        return self.last(nn.functional.silu(self.first(pose)))
