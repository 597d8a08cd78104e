"""How eps_phi is built and trained. Apart from lora_unet.py, so that reading a configuration does not import diffusers."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """eps_phi and its optimiser."""

    rank: int = 4
    """Rank of the LoRA layers on q, k, v and out of every attention."""
    lr: float = 1e-4
    """AdamW's learning rate."""
    weight_decay: float = 0.01
    num_warmup_updates: int = 500
    """Updates over which the learning rate rises linearly to lr."""
    steps_per_update: int = 1
    """AdamW steps of phi after each step of the particles, each with its own draws on the same renders."""
    pose_dropout: float = 0.1
    """Probability that phi's training sees no camera."""

    def __post_init__(self) -> None:
        for name in ("rank", "steps_per_update"):
            if getattr(self, name) < 1:
                raise ValueError(f"score.{name} must be at least 1, got {getattr(self, name)}: raise --score.{name.replace('_', '-')}")
        if not 0.0 <= self.pose_dropout <= 1.0:
            raise ValueError(f"score.pose_dropout must be in [0, 1], got {self.pose_dropout}: change --score.pose-dropout")
