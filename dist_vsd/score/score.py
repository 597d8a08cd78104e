"""What an update asks of eps_phi, whatever it is made of."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dist_vsd.priors.prior import Text


class Score(Protocol):
    """eps_phi(x_t, t, c, y), the noise predictor of the particles' renders; asking it leaves the prior as it is."""

    def __call__(self, x_t: Tensor, t: Tensor, y: Text, pose: Tensor) -> Tensor:
        """Predict the noise in (B, ...) noised renders at (B,) timesteps, given B texts and (B, P) poses."""
        ...
