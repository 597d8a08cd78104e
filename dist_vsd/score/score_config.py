"""How eps_phi is built and trained. Apart from lora_score.py, so that reading a configuration does not import diffusers."""

from __future__ import annotations

import dataclasses

CAMERAS = ("c2w", "spherical", "none")
LOSSES = ("", "eps", "v")
TARGETS = ("attention", "feedforward", "convolutions", "time")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """eps_phi and its optimiser."""

    rank: int = 4
    """Rank of the LoRA layers."""
    targets: tuple[str, ...] = ("attention",)
    """Where they stand: attention (q, k, v and out of each, as published), feedforward (behind attention), convolutions, and time (what
    tells convolutions the time). A network without attention at its finest level sees fine texture by convolutions alone."""
    alpha: float = 0.0
    """LoRA's alpha: its layers are scaled by alpha / rank; 0: as the rank, a scale of 1."""
    prior: str = ""
    """Another checkpoint whose UNet phi sits on, as ProlificDreamer's does (2.1 beside 2.1-base); empty: the prior's own."""
    camera: str = "c2w"
    """The pose that phi is told: c2w (4 x 4), spherical (elevation, sine and cosine of azimuth, distance: threestudio's) or none."""
    loss: str = ""
    """phi's regression: eps; v, which weighs the same error by 1 / alpha_t^2, 100 at most (Salimans and Ho 2022), and is the velocity of a
    rectified flow; empty: as the prior's process is trained, eps if it is variance preserving, v if a flow."""
    lr: float = 1e-4
    """AdamW's learning rate."""
    weight_decay: float = 0.01
    num_warmup_updates: int = 500
    """Updates over which the learning rate rises linearly to lr."""
    steps_per_update: int = 1
    """AdamW steps of phi after each step of the particles, each with its own draws on the same renders (DMD2 needed 5 to 10)."""
    pose_dropout: float = 0.1
    """Probability that phi's training sees no camera."""
    entropy_weight: float = 0.0
    """Lambda of entropic score distillation (Wang et al. 2024, arXiv 2401.00909): the share of eps_phi without the camera; 0: VSD."""
    keep: bool = False
    """A later stage's phi goes on, without another warm-up, from where the last stage before that had one has left it, if any had; else
    it is new."""
    recompute: bool = False
    """phi's pass keeps no activations inside the network's blocks and computes them again on the way back: less memory, a pass more."""
    reuse_pass: bool = False
    """phi's training pass also serves as its score: same t and noise for both, one pass of the UNet less an update."""

    def __post_init__(self) -> None:
        for name in ("rank", "steps_per_update"):
            if getattr(self, name) < 1:
                raise ValueError(f"score.{name} must be at least 1, got {getattr(self, name)}: raise --score.{name.replace('_', '-')}")
        for name in ("pose_dropout", "entropy_weight"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"score.{name} must be in [0, 1], got {getattr(self, name)}: change --score.{name.replace('_', '-')}")
        if self.alpha < 0:
            raise ValueError(f"score.alpha must be 0 (as the rank) or more, got {self.alpha}: raise --score.alpha")
        if not self.targets or len(set(self.targets)) < len(self.targets) or not set(self.targets) <= set(TARGETS):
            raise ValueError(
                f"score.targets must name some of {', '.join(TARGETS)}, each once, got {' '.join(self.targets) or 'none'}: "
                "change --score.targets"
            )
        for name, choices in (("camera", CAMERAS), ("loss", LOSSES)):
            if getattr(self, name) not in choices:
                known = ", ".join(filter(None, choices))
                raise ValueError(f"score.{name} must be one of {known}, got {getattr(self, name)!r}: change --score.{name}")
        if self.reuse_pass and self.steps_per_update > 1:
            raise ValueError(
                f"score.reuse_pass has one pass of phi an update, got score.steps_per_update {self.steps_per_update}: use one of them"
            )
        if self.reuse_pass and self.entropy_weight > 0:
            raise ValueError("score.reuse_pass asks phi once, and score.entropy_weight twice, with the camera and without: use one of them")
        if self.entropy_weight > 0 and (self.camera == "none" or self.pose_dropout == 0):
            raise ValueError(
                "score.entropy_weight wants a phi that is trained with and without the camera: raise --score.pose-dropout above 0, "
                f"and choose a camera (got pose_dropout {self.pose_dropout:g}, camera {self.camera})"
            )
