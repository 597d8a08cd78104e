"""From encoded renders to what a diffusion model is asked about: x_t = alpha_t x_0 + sigma_t eps, its texts and its poses."""

from __future__ import annotations

from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.diffusion.process import add_noise
from dist_vsd.diffusion.timesteps import timestep_weight
from dist_vsd.objectives.objective import Batch, Noised
from dist_vsd.training.draws import Shot, draw_cameras, draw_noise, draw_t, key
from dist_vsd.training.encoded_renders import pose_for_phi
from dist_vsd.training.phi.step import PhiStep, absent_render
from dist_vsd.training.state import TrainingState
from dist_vsd.training.work import Work


def add_drawn_noise(state: TrainingState, shots: list[Shot], cameras: Cameras, x_0: Tensor, index: int) -> Noised:
    """Draw t and eps of each shot and noise its encoded renders.

    Args:
        state: of the run.
        shots: of B views in all.
        cameras: B, of the views.
        x_0: (B, ...) encoded renders.
        index: of the update.
    """
    config, process = state.config, state.prior.process
    y_c = state.prompt.for_cameras(cameras, config.camera)
    t = draw_t(config, shots, index, state.stage.progress(index), process).to(x_0.device)
    eps = draw_noise(config, "noise", shots, index, x_0)
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


def join_passes(state: TrainingState, work: Work, shared_pass: PhiStep | None, index: int) -> None:
    """Take part, with a weight of zero, in passes of the other ranks through phi's network, where this rank has fewer micro-batches."""
    phi = state.phi
    assert phi is not None
    if not (phi.same_forwards or shared_pass is not None):
        return
    for _ in range(work.missing_passes(phi)):
        absent = absent_render(state)
        cameras = draw_cameras(state.config, absent.shots, index).to(state.prior.device)
        noised = add_drawn_noise(state, absent.shots, cameras, absent.x_0, index)
        if shared_pass is not None:
            noised = shared_pass.learn_at(absent, noised)
        generators = [key(state.config, "augmentation", shot, index) for shot in absent.shots]
        state.objective.cotangents(Batch([], cameras, 0.0, generators, noised))
