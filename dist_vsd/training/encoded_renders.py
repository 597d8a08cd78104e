"""Renders of a micro-batch: encoded, noised for the diffusion model, and as phi learns from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.config import RunConfig
from dist_vsd.diffusion.process import add_noise
from dist_vsd.diffusion.timesteps import timestep_weight
from dist_vsd.distributed.layout import Shot
from dist_vsd.objectives.objective import Noised
from dist_vsd.particles.background import over_random_background
from dist_vsd.particles.particle import Render
from dist_vsd.priors.prior import Prior
from dist_vsd.score.camera_embedding import pose_of
from dist_vsd.training.draws import Draws
from dist_vsd.training.state import TrainingState
from dist_vsd.training.work import MicroBatch


def render(config: RunConfig, batch: MicroBatch, draws: Draws) -> list[Render]:
    """Render g(theta, c) of each shot, all its views at once; theta's graph is kept unless gradients are off."""
    renders = []
    for shot in batch.shots:
        one = batch.particle_of(shot).theta.render(draws.cameras([shot]), config.render_size, draws.of_render(shot))
        renders.append(over_random_background(one, draws.background(shot)) if config.random_background_share > 0 else one)
    return renders


def encode(config: RunConfig, prior: Prior, renders: list[Render]) -> Tensor:
    """Return x_0 = E(g(theta, c)) of all views, (B, ...); a latent particle is its own x_0."""
    image = torch.cat([one.channel(config.supervise) for one in renders])
    return image if config.representation_row.is_latent else prior.encode(image)


def pose_for_phi(config: RunConfig, cameras: Cameras) -> Tensor:
    """Describe cameras to phi, (B, P); a picture has no pose."""
    return pose_of(cameras, config.score.camera) * (0.0 if config.is_flat else 1.0)


def add_drawn_noise(state: TrainingState, shots: list[Shot], cameras: Cameras, x_0: Tensor, draws: Draws) -> Noised:
    """Noise the encoded renders of each shot by its t and eps.

    Args:
        state: of the run.
        shots: of B views in all.
        cameras: B, of the views.
        x_0: (B, ...) encoded renders.
        draws: of the update.
    """
    config, process = state.config, state.prior.process
    y_c = state.prompt.for_views(draws.views(shots), cameras.azimuth_deg)
    t, eps = draws.t(shots), draws.noise(shots)
    alpha_t, sigma_t = process.alpha_sigma(t, x_0)
    return Noised(
        x_0=x_0,
        x_t=add_noise(x_0.detach(), eps, alpha_t, sigma_t),
        t=t,
        eps=eps,
        alpha_t=alpha_t,
        sigma_t=sigma_t,
        w_t=timestep_weight(config.timesteps.weighting, alpha_t, sigma_t),
        y_c=y_c,
        y=state.prompt.plain.cond.expand(len(x_0)),
        pose=pose_for_phi(config, cameras),
        cameras=cameras if state.prior.knows_cameras else None,
    )


@dataclasses.dataclass(frozen=True)
class EncodedRenders:
    """Encoded renders of one update on this rank, in rows: the views of the first shot, of the second ...

    Attributes:
        shots: of B views in all.
        x_0: (B, ...) encoded, or noised, detached; zeros in all views of a shot of which one was not finite.
        pose: (B, P).
        cameras: B, from which they were seen, for a prior that knows cameras; else None.
        weight: (B,) 1, or 0 in a shot that was not finite.
    """

    shots: list[Shot]
    x_0: Tensor
    pose: Tensor
    cameras: Cameras | None
    weight: Tensor

    @staticmethod
    def of(shots: list[Shot], x_0: Tensor, pose: Tensor, cameras: Cameras | None) -> EncodedRenders:
        """Take renders as they are, but for shots that are not finite."""
        x_0 = x_0.detach()
        finite = x_0.isfinite().flatten(1).all(1)
        views_per_shot = shots[0].num_views
        if views_per_shot > 1:  # a prior that scores views together would spread what is not finite
            finite = finite.view(-1, views_per_shot).all(1).repeat_interleave(views_per_shot)
        kept = x_0.where(finite.view(-1, *[1] * (x_0.ndim - 1)), torch.zeros_like(x_0))
        return EncodedRenders(shots, kept, pose, cameras, finite.to(x_0))

    @staticmethod
    def absent(shot: Shot, prior: Prior, pose_width: int) -> EncodedRenders:
        """Return a shot that weighs nothing, for a rank that has none and must join in the others' passes."""
        count, device = shot.num_views, prior.device
        x_0, pose = torch.zeros(count, *prior.latent_shape, device=device), torch.zeros(count, pose_width, device=device)
        cameras = Cameras.none(count, device) if prior.knows_cameras else None
        return EncodedRenders([shot], x_0, pose, cameras, torch.zeros(count, device=device))

    def ids(self) -> list[tuple[int, int]]:
        """Return (particle, number) of each shot."""
        return [(shot.particle, shot.number) for shot in self.shots]


def in_micro_batches(renders: Sequence[EncodedRenders], particles: frozenset[int], size: int) -> list[EncodedRenders]:
    """Join renders, keep those of some particles, and cut them into micro-batches of ``size`` shots."""
    if not renders:
        return []
    shots = [shot for batch in renders for shot in batch.shots]
    kept = [place for place, shot in enumerate(shots) if shot.particle in particles]
    x_0, pose, weight = (torch.cat([getattr(batch, name) for batch in renders]) for name in ("x_0", "pose", "weight"))
    known = [batch.cameras for batch in renders if batch.cameras is not None]
    cameras, num_views, cut = Cameras.cat(known) if known else None, shots[0].num_views, []
    for part in (kept[i : i + size] for i in range(0, len(kept), size)):
        rows = [slice(place * num_views, (place + 1) * num_views) for place in part]  # no list of indices, which would be copied
        seen_from = None if cameras is None else Cameras.cat([cameras[views] for views in rows])
        x_0_rows, pose_rows, weight_rows = (torch.cat([tensor[views] for views in rows]) for tensor in (x_0, pose, weight))
        cut.append(EncodedRenders([shots[place] for place in part], x_0_rows, pose_rows, seen_from, weight_rows))
    return cut
