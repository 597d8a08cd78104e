"""What a run may ask of a prior that is a rectified flow. Apart from flow.py, so that reading a configuration imports no torch."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Of a prior that is a rectified flow: Stable Diffusion 3, FLUX, SANA."""

    shift: float | None = None
    """k of s = k u / (1 + (k - 1) u); None: the scheduler's own."""
    guidance_embedding: float | None = None
    """The scale that a prior distilled from guidance (FLUX-dev) is told, and phi 1; None: 3.5."""
    image_size: int = 0
    """Pixels on a side of the pictures that the prior is shown; 0: as in its training."""

    def __post_init__(self) -> None:
        if self.shift is not None and not 0.0 < self.shift < math.inf:
            raise ValueError(f"flow.shift must be a positive number, got {self.shift}: use 1 for none, or 3 as SD3 does (--flow.shift)")
        scale = self.guidance_embedding
        if scale is not None and not 0.0 <= scale < math.inf:
            raise ValueError(f"flow.guidance_embedding must be a number from 0 on, got {scale}: change --flow.guidance-embedding")
        if self.image_size < 0:
            raise ValueError(f"flow.image_size must be 0 (that of the prior) or more, got {self.image_size}: change --flow.image-size")


AS_IT_IS = FlowConfig()  # nothing is asked of it
