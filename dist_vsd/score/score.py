"""What an update asks of eps_phi, whatever it is made of."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.diffusion.process import Process
from dist_vsd.priors.prior import Text


class Score(Protocol):
    """eps_phi(x_t, t, c, y), the noise predictor of the particles' renders; asking it leaves the prior as it is.

    Attributes:
        process: what its network predicts; x_t is noised alike by the prior's.
    """

    process: Process

    def __call__(self, x_t: Tensor, t: Tensor, y: Text, pose: Tensor, cameras: Cameras | None = None) -> Tensor:
        """Return what phi predicts, which ``process.eps`` turns into eps_phi, of (B, ...) noised renders at (B,) times of the process.

        Given B texts and (B, P) poses, and B cameras for a network that knows them itself.
        """
        ...
