"""The camera as a condition of eps_phi."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CameraEmbedding(nn.Module):
    """Map a camera pose to an offset of the UNet's time embedding: Linear, SiLU, Linear (ProlificDreamer, section 3.2).

    Deviation: the last layer starts at zero. In both public implementations it does not, so that their eps_phi differs
    from the pretrained model before the first step.

    Args:
        width: of the time embedding.
        generator: draws the first layer, on the CPU.
    """

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Linear(16, width)
        self.last = nn.Linear(width, width)
        with torch.no_grad():
            self.first.weight.copy_((torch.rand(width, 16, generator=generator) * 2 - 1) / 4)
            self.first.bias.zero_()
            self.last.weight.zero_()
            self.last.bias.zero_()

    def forward(self, c2w: Tensor) -> Tensor:
        """Return (B, width) offsets for (B, 4, 4) camera-to-world matrices (zeros for a dropped pose)."""
        return self.last(nn.functional.silu(self.first(c2w.reshape(-1, 16))))
