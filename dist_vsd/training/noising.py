"""From encoded renders to what a diffusion model is asked about: x_t = alpha_t x_0 + sigma_t eps, its texts and its poses."""

from __future__ import annotations

from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.diffusion.process import add_noise
from dist_vsd.diffusion.timesteps import timestep_weight
from dist_vsd.objectives.objective import Batch, Noised
from dist_vsd.training.draws import Shot
from dist_vsd.training.encoded_renders import pose_for_phi
from dist_vsd.training.phi.step import PhiStep, absent_render
from dist_vsd.training.state import TrainingState
from dist_vsd.training.update_draws import Draws
from dist_vsd.training.work import Work


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


def join_passes(state: TrainingState, work: Work, shared_pass: PhiStep | None, draws: Draws) -> None:
    """Take part, with a weight of zero, in passes of the other ranks through phi's network, where this rank has fewer micro-batches."""
    phi = state.phi
    assert phi is not None
    if not (phi.same_forwards or shared_pass is not None):
        return
    for _ in range(work.missing_passes(phi)):
        absent = absent_render(state)
        cameras = draws.cameras(absent.shots)
        noised = add_drawn_noise(state, absent.shots, cameras, absent.x_0, draws)
        if shared_pass is not None:
            noised = shared_pass.learn_at(absent, noised)
        state.objective.cotangents(Batch([], cameras, 0.0, [], noised))
