"""How long each stage of the recipe is. Apart from recipe.py, so that reading flags does not import diffusers."""

from __future__ import annotations

import dataclasses

NUM_HELD_OUT_SHARDS = 4
NUM_HELD_OUT_GROUP_SHARDS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """How long each stage is; the defaults made the weights that ship."""

    num_shards: int = 64
    """Shards of 768 pictures; the last 4 are held out for the measurements."""
    vae_steps: int = 2400
    """Steps of batch 16."""
    denoiser_steps: int = 4000
    """Steps of batch 64, UNet and text encoder together."""
    clip_steps: int = 1600
    """Steps of batch 128."""
    seed: int = 0
    """Of pictures, starts and draws."""
    num_workers: int = 2
    """Processes that render pictures."""

    def __post_init__(self) -> None:
        if self.num_shards <= NUM_HELD_OUT_SHARDS:
            raise ValueError(f"--num-shards must be above {NUM_HELD_OUT_SHARDS}, the number held out, got {self.num_shards}")
        _require_one(self, "vae_steps", "denoiser_steps", "clip_steps", "num_workers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiViewRecipeConfig:
    """How long the stages of the multi-view prior are; the defaults made the weights that ship."""

    num_group_shards: int = 92
    """Shards of 180 groups of four views; the last 2 are held out for the measurements."""
    steps: int = 4300
    """Of the UNet and the text encoder together."""
    batch: int = 16
    """Groups of four views a step."""
    learning_rate: float = 8e-4
    """Of AdamW at its peak."""
    seed: int = 0
    """Of groups, starts and draws."""
    num_workers: int = 2
    """Processes that render and encode groups."""

    def __post_init__(self) -> None:
        least = NUM_HELD_OUT_GROUP_SHARDS
        if self.num_group_shards <= least:
            raise ValueError(f"--num-group-shards must be above {least}, the number held out, got {self.num_group_shards}")
        _require_one(self, "steps", "batch", "num_workers")
        _require_rate(self.learning_rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowRecipeConfig:
    """How long the stages of the flow prior are; the card of the weights that ship says how theirs were."""

    num_shards: int = 24
    """Shards of 768 pictures; the last 4 are held out for the measurements."""
    steps: int = 6000
    """Of the transformer and the text encoder together."""
    batch: int = 16
    """Pictures a step."""
    learning_rate: float = 1.2e-3
    """Of AdamW at its peak."""
    seed: int = 0
    """Of pictures, starts and draws."""
    num_workers: int = 2
    """Processes that render pictures."""

    def __post_init__(self) -> None:
        if self.num_shards <= NUM_HELD_OUT_SHARDS:
            raise ValueError(f"--num-shards must be above {NUM_HELD_OUT_SHARDS}, the number held out, got {self.num_shards}")
        _require_one(self, "steps", "batch", "num_workers")
        _require_rate(self.learning_rate)


def _require_one(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")


def _require_rate(learning_rate: float) -> None:
    if not learning_rate > 0:
        raise ValueError(f"--learning-rate must be above 0, got {learning_rate}")
