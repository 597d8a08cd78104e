"""What pulls a micro-batch of renders, by objective: a gradient at x_0 from scores, or a loss by CLIP."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.config import RunConfig
from dist_vsd.diffusion.process import add_noise
from dist_vsd.diffusion.timesteps import timestep_weight
from dist_vsd.objectives.clip import clip_loss, target_opacity, transmittance_loss
from dist_vsd.objectives.denoising import denoising_gradient
from dist_vsd.objectives.sds import sds_gradient
from dist_vsd.objectives.vsd import eps_of_particles, vsd_gradient
from dist_vsd.particles.particle import Render
from dist_vsd.priors.prior import Prior, Text, TextEmbeddings, eps_pretrain
from dist_vsd.score.score import Score
from dist_vsd.training.draws import Shot, key
from dist_vsd.training.report import Report
from dist_vsd.training.state import TrainingState


@torch.no_grad()
def score_gradient(
    config: RunConfig, prior: Prior, score: Score | None, x_0: Tensor, t: Tensor, eps: Tensor, y_c: TextEmbeddings, y: Text, pose: Tensor
) -> Tensor:
    """Return the gradient with respect to x_0 of the objectives that ask a diffusion model.

    VSD (ProlificDreamer, equation 9), SDS (DreamFusion, equation 3), or the denoising loss with the UNet's Jacobian (its equation 2).

    Args:
        config: names the objective, and holds s, w(t) and lambda.
        prior: the frozen model.
        score: eps_phi, for VSD; else None.
        x_0: (B, ...) encoded renders.
        t: (B,) times of the process.
        eps: noise, like x_0.
        y_c: embeddings of the prompt with view words, of which eps_pretrain is asked.
        y: B plain prompts, of which eps_phi is asked.
        pose: (B, P), as phi is told it.

    Returns:
        Like x_0.
    """
    alpha_t, sigma_t = prior.process.alpha_sigma(t, x_0)
    x_t = add_noise(x_0, eps, alpha_t, sigma_t)
    w_t = timestep_weight(config.timesteps.weighting, alpha_t, sigma_t)
    if config.objective == "denoising":
        return denoising_gradient(lambda x: eps_pretrain(prior, x, t, y_c, config.guidance_scale), x_0, eps, alpha_t, sigma_t, w_t)
    if config.objective == "sds":
        return sds_gradient(eps_pretrain(prior, x_t, t, y_c, config.guidance_scale), eps, w_t)
    assert score is not None
    with score.pretrained():
        eps_prior = eps_pretrain(prior, x_t, t, y_c, config.guidance_scale)
    return vsd_gradient(eps_prior, eps_of_particles(score, x_t, t, y, pose, config.score.entropy_weight), w_t)


def score_gap(prior: Prior, gradient: Tensor, t: Tensor, weighting: str) -> Tensor:
    """Return ||eps_pretrain - eps_phi|| of each render, (B,), from VSD's gradient w(t) (eps_pretrain - eps_phi)."""
    w_t = timestep_weight(weighting, *prior.process.alpha_sigma(t, gradient))
    return (gradient / w_t).flatten(1).norm(dim=1)


def clip_objective(
    state: TrainingState, shots: list[Shot], renders: list[Render], cameras: Cameras, index: int, report: Report
) -> Tensor:
    """Return Dream Fields' loss, summed over a micro-batch; differentiable in the renders.

    Args:
        state: of the run, with its CLIP.
        shots: B renders.
        renders: of them, one each.
        cameras: B.
        index: of the update.
        report: takes the similarity and the transmittance.
    """
    assert state.clip is not None
    config = state.config
    foreground, opacity = torch.cat([r.foreground for r in renders]), torch.cat([r.opacity for r in renders])
    generators = [key(config, "augmentation", shot, index) for shot in shots]
    loss = clip_loss(state.clip.scorer, state.clip.text, foreground, opacity, config.clip, generators)
    report.figures["clip/crop_similarity"].append(-loss.detach().mean())
    if not config.is_flat:
        target = target_opacity(config.clip, index / config.num_updates, cameras.c2w[:, :3, 3].norm(dim=1), cameras.fov)
        loss = loss + config.clip.transmittance_weight * transmittance_loss(opacity, target)
    return loss.sum()
