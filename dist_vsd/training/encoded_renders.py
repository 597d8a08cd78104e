"""Renders of a micro-batch, and their encodings as phi learns from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.config import RunConfig
from dist_vsd.particles.background import over_random_background
from dist_vsd.particles.particle import Render
from dist_vsd.priors.stable_diffusion import StableDiffusionPrior
from dist_vsd.score.camera_embedding import pose_of
from dist_vsd.training.draws import Shot, key
from dist_vsd.training.work import MicroBatch


def render(config: RunConfig, batch: MicroBatch, cameras: Cameras, index: int) -> list[Render]:
    """Render g(theta, c) of each shot; theta's graph is kept unless gradients are off."""
    renders = [
        batch.particle_of(shot).theta.render(cameras[i : i + 1], config.render_size, key(config, "ray_jitter", shot, index))
        for i, shot in enumerate(batch.shots)
    ]
    share = config.field.random_background_share if config.representation_row.is_volume else 0.0
    if share == 0:
        return renders
    pairs = zip(renders, batch.shots, strict=True)
    return [over_random_background(one, share, key(config, "background", shot, index)) for one, shot in pairs]


def encode(config: RunConfig, prior: StableDiffusionPrior, renders: list[Render]) -> Tensor:
    """Return x_0 = E(g(theta, c)) of B renders, (B, ...); a latent particle is its own x_0."""
    image = torch.cat([one.image for one in renders])
    return image if config.representation_row.is_latent else prior.encode(image)


def pose_for_phi(config: RunConfig, cameras: Cameras) -> Tensor:
    """Describe cameras to phi, (B, P); a picture has no pose."""
    return pose_of(cameras, config.score.camera) * (0.0 if config.is_flat else 1.0)


@dataclasses.dataclass(frozen=True)
class EncodedRenders:
    """Encoded renders of one update on this rank.

    Attributes:
        shots: B renders.
        x_0: (B, ...) encoded, or noised, detached; zeros where a render was not finite.
        pose: (B, P).
        weight: (B,) 1, or 0 where a render was not finite.
    """

    shots: list[Shot]
    x_0: Tensor
    pose: Tensor
    weight: Tensor

    @staticmethod
    def of(shots: list[Shot], x_0: Tensor, pose: Tensor) -> EncodedRenders:
        """Take renders as they are, but for those that are not finite."""
        x_0 = x_0.detach()
        finite = x_0.isfinite().flatten(1).all(1)
        kept = x_0.where(finite.view(-1, *[1] * (x_0.ndim - 1)), torch.zeros_like(x_0))
        return EncodedRenders(shots, kept, pose, finite.to(x_0))

    @staticmethod
    def absent(shot: Shot, latent_shape: tuple[int, ...], pose_width: int, device: torch.device) -> EncodedRenders:
        """Return a render that weighs nothing, for a rank that has none and must join in the others' passes."""
        x_0, pose = torch.zeros(1, *latent_shape, device=device), torch.zeros(1, pose_width, device=device)
        return EncodedRenders([shot], x_0, pose, torch.zeros(1, device=device))

    def ids(self) -> list[tuple[int, int]]:
        """Return (particle, view) of each."""
        return [(shot.particle, shot.view) for shot in self.shots]


def in_micro_batches(renders: Sequence[EncodedRenders], particles: frozenset[int], size: int) -> list[EncodedRenders]:
    """Join renders, keep those of some particles, and cut them into micro-batches of ``size``."""
    if not renders:
        return []
    shots = [shot for batch in renders for shot in batch.shots]
    kept = [row for row, shot in enumerate(shots) if shot.particle in particles]
    tensors = [torch.cat([getattr(batch, name) for batch in renders]) for name in ("x_0", "pose", "weight")]
    rows = [kept[i : i + size] for i in range(0, len(kept), size)]
    return [EncodedRenders([shots[row] for row in part], *(tensor[part] for tensor in tensors)) for part in rows]
