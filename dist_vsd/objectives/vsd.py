"""Variational score distillation (ProlificDreamer, equation 9) and the loss that teaches phi (equation 8)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.diffusion.guidance import classifier_free_guidance
from dist_vsd.objectives.objective import Batch, Cotangents, Objective, of_scores
from dist_vsd.priors.prior import Prior, Text, eps_pretrain
from dist_vsd.score.score import Score

if TYPE_CHECKING:
    from dist_vsd.config import RunConfig


class Vsd(Objective):
    """ProlificDreamer's objective (see Objective): it needs phi."""

    def __init__(self, config: RunConfig, prior: Prior, score: Score | None) -> None:
        assert score is not None
        self._prior, self._score = prior, score
        self._guidance, self._entropy_weight = config.guidance, config.score.entropy_weight

    @torch.no_grad()
    def cotangents(self, batch: Batch) -> Cotangents:
        """See Objective."""
        noised = batch.noised
        assert noised is not None
        guidance_scale = self._guidance.at(self._prior.process, noised.t, noised.x_t)
        eps_prior = eps_pretrain(self._prior, noised.x_t, noised.t, noised.y_c, guidance_scale, noised.cameras)
        eps_phi = noised.eps_phi
        if eps_phi is None:
            given = (noised.x_t, noised.t, noised.y, noised.pose)
            eps_phi = eps_of_particles(self._score, *given, self._entropy_weight, noised.cameras)
        return of_scores(noised, vsd_gradient(eps_prior, eps_phi, noised.w_t), has_phi=True)


def vsd_gradient(eps_pretrain: Tensor, eps_phi: Tensor, w_t: Tensor) -> Tensor:
    """Return w(t) (eps_pretrain(x_t; y^c, s) - eps_phi(x_t; c, y)), the gradient with respect to x_0.

    As in the paper, the factor alpha_t of dx_t/dx_0 is left to w(t).

    Args:
        eps_pretrain, eps_phi: (B, ...) predictions at the same x_t.
        w_t: (B, 1, ...) weights.

    Returns:
        Like eps_pretrain; to be fed to backward() at x_0.
    """
    return w_t * (eps_pretrain - eps_phi)


def eps_of_particles(
    score: Score, x_t: Tensor, t: Tensor, y: Text, pose: Tensor, entropy_weight: float, cameras: Cameras | None = None
) -> Tensor:
    """Return eps_phi(x_t; c, y), or its mixture with eps_phi(x_t; y), which sees no camera (entropic score distillation).

    (1 - lambda) eps_phi(x_t; c, y) + lambda eps_phi(x_t; y): guidance on phi's camera with a scale of 1 - lambda (Wang et al. 2024,
    arXiv 2401.00909; their code is threestudio with a guidance_scale_lora of 0.5, which is that scale). It adds the entropy of the
    renders over all cameras to the objective, so that views differ.

    Args:
        score: eps_phi.
        x_t: (B, ...) noised renders.
        t: (B,) times of the process.
        y: B texts without view words.
        pose: (B, P); zeros stand for none.
        entropy_weight: lambda in [0, 1]; 0 asks once.
        cameras: B, for a network that knows cameras itself.
    """
    if entropy_weight == 0:
        return score.process.eps(score(x_t, t, y, pose, cameras), x_t, t)
    poses = torch.cat([pose, torch.zeros_like(pose)])
    twice = None if cameras is None else Cameras.cat([cameras, cameras])
    both = score(torch.cat([x_t, x_t]), torch.cat([t, t]), Text.cat([y, y]), poses, twice)
    posed, unposed = both.chunk(2)
    return score.process.eps(classifier_free_guidance(unposed, posed, 1.0 - entropy_weight), x_t, t)


def phi_loss(error: Tensor) -> Tensor:
    """Return each render's denoising loss, mean ||eps_phi(x_t') - eps'||^2 over its coordinates, or that of v.

    Args:
        error: (B, ...) of Process.error.

    Returns:
        (B,); the gradient flows to phi.
    """
    return error.square().flatten(1).mean(1)
