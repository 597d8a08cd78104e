"""How strong guidance is, by t. Apart from its formulas, so that reading a configuration imports no torch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from dist_vsd.diffusion.process import Process


@dataclasses.dataclass(frozen=True)
class GuidanceScale:
    """s, and another one for small t.

    Where t is high, shape and view are decided, which a prior may follow only if it is pushed; where it is low, colours and texture are,
    which strong guidance saturates.

    Attributes:
        coarse: s where t is above ``boundary``.
        fine: s up to there.
        boundary: fraction of the whole range of t.
    """

    coarse: float
    fine: float
    boundary: float

    def at(self, process: Process, t: Tensor, x_t: Tensor) -> float | Tensor:
        """Return s, or (B, 1, ...) of them where they differ, for (B, ...) x_t at (B,) times t of a process."""
        if self.coarse == self.fine:
            return self.coarse
        is_coarse = (process.fraction(t) > self.boundary).to(x_t.dtype).reshape(-1, *[1] * (x_t.ndim - 1))
        return self.fine + (self.coarse - self.fine) * is_coarse
