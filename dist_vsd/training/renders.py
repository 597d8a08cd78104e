"""Encoded renders, as phi learns from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dist_vsd.score.camera_embedding import POSE_WIDTHS
from dist_vsd.training.draws import Shot
from dist_vsd.training.state import TrainingState


@dataclasses.dataclass(frozen=True)
class Renders:
    """Encoded renders of one update on this rank.

    Attributes:
        shots: B renders.
        x_0: (B, ...) encoded, detached; zeros where a render was not finite.
        pose: (B, P).
        weight: (B,) 1, or 0 where a render was not finite.
    """

    shots: list[Shot]
    x_0: Tensor
    pose: Tensor
    weight: Tensor

    @staticmethod
    def of(shots: list[Shot], x_0: Tensor, pose: Tensor) -> Renders:
        """Take renders as they are, but for those that are not finite."""
        x_0 = x_0.detach()
        finite = x_0.isfinite().flatten(1).all(1)
        return Renders(shots, x_0.where(finite.view(-1, *[1] * (x_0.ndim - 1)), torch.zeros_like(x_0)), pose, finite.to(x_0))

    def ids(self) -> list[tuple[int, int]]:
        """Return (particle, view) of each."""
        return [(shot.particle, shot.view) for shot in self.shots]


def absent_render(state: TrainingState) -> Renders:
    """Return a render that weighs nothing, for a rank that has none and must join in the others' passes."""
    device = state.prior.device
    pose = torch.zeros(1, POSE_WIDTHS[state.config.score.camera], device=device)
    x_0 = torch.zeros(1, *state.prior.latent_shape, device=device)
    return Renders([Shot(state.particles[0].id, state.layout.views[0])], x_0, pose, torch.zeros(1, device=device))


def in_micro_batches(renders: Sequence[Renders], particles: frozenset[int], size: int) -> list[Renders]:
    """Join renders, keep those of some particles, and cut them into micro-batches of ``size``."""
    if not renders:
        return []
    shots = [shot for batch in renders for shot in batch.shots]
    kept = [row for row, shot in enumerate(shots) if shot.particle in particles]
    tensors = [torch.cat([getattr(batch, name) for batch in renders]) for name in ("x_0", "pose", "weight")]
    rows = [kept[i : i + size] for i in range(0, len(kept), size)]
    return [Renders([shots[row] for row in part], *(tensor[part] for tensor in tensors)) for part in rows]
