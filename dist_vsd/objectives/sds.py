"""Score distillation sampling (DreamFusion, equation 3): VSD with the particles' distribution a point mass; and MVDream's form of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dist_vsd.diffusion.process import x_0_from_eps
from dist_vsd.objectives.objective import Batch, Cotangents, Noised, Objective, of_scores
from dist_vsd.priors.prior import Prior, eps_pretrain, guided_and_conditional

if TYPE_CHECKING:
    from dist_vsd.config import RunConfig
    from dist_vsd.score.score import Score


class Sds(Objective):
    """DreamFusion's objective (see Objective): it needs no phi."""

    def __init__(self, config: RunConfig, prior: Prior, score: Score | None) -> None:
        self._prior, self._guidance, self._settings = prior, config.guidance, config.sds

    @torch.no_grad()
    def cotangents(self, batch: Batch) -> Cotangents:
        """See Objective."""
        noised = batch.noised
        assert noised is not None
        if self._settings.form == "x_0":
            return of_scores(noised, self._toward_x_0(noised))
        guidance_scale = self._guidance.at(self._prior.process, noised.t, noised.x_t)
        eps_prior = eps_pretrain(self._prior, noised.x_t, noised.t, noised.y_c, guidance_scale, noised.cameras)
        return of_scores(noised, sds_gradient(eps_prior, noised.eps, noised.w_t))

    def _toward_x_0(self, noised: Noised) -> Tensor:
        prior, asked = self._prior, (noised.x_t, noised.t)
        guidance_scale = self._guidance.at(prior.process, noised.t, noised.x_t)
        guided, cond = guided_and_conditional(prior, *asked, noised.y_c, guidance_scale, noised.cameras)
        estimates = [
            x_0_from_eps(prior.process.eps(prediction, *asked), noised.x_t, noised.alpha_t, noised.sigma_t) for prediction in (guided, cond)
        ]
        estimate = rescaled(*estimates, self._settings.rescale, prior.views_per_shot)
        return noised.x_0.detach() - estimate


def rescaled(guided: Tensor, cond: Tensor, share: float, views_per_shot: int = 1) -> Tensor:
    """Take guided estimates of x_0 back to the spread of those without guidance, which saturate less.

    As of Lin et al. (2023, section 3.4), in x_0 and over all views of a shot, as MVDream does (Shi et al. 2023, section 3.4):
    x_0 <- share x_0 std(cond) / std(x_0) + (1 - share) x_0.

    Args:
        guided, cond: (B, ...) estimates with and without guidance.
        share: 0 leaves them as they are.
        views_per_shot: V, rows that are measured together.
    """
    if not share:
        return guided
    spread, wanted = (x_0.reshape(len(x_0) // views_per_shot, -1).std(1).repeat_interleave(views_per_shot) for x_0 in (guided, cond))
    factor = (wanted / spread).reshape(-1, *[1] * (guided.ndim - 1))
    return guided * (share * factor + 1 - share)


def sds_gradient(eps_pretrain: Tensor, eps: Tensor, w_t: Tensor) -> Tensor:
    """Return w(t) (eps_pretrain(x_t; y^c, s) - eps), the gradient with respect to x_0.

    Args:
        eps_pretrain: (B, ...) prediction at x_t.
        eps: (B, ...) the noise in x_t.
        w_t: (B, 1, ...) weights.

    Returns:
        Like eps_pretrain; to be fed to backward() at x_0.
    """
    return w_t * (eps_pretrain - eps)
