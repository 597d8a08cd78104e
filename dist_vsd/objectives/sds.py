"""Score distillation sampling (DreamFusion, equation 3): VSD with the particles' distribution a point mass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dist_vsd.objectives.objective import Batch, Cotangents, Objective, of_scores
from dist_vsd.priors.prior import Prior, eps_pretrain

if TYPE_CHECKING:
    from dist_vsd.config import RunConfig
    from dist_vsd.score.score import Score


class Sds(Objective):
    """DreamFusion's objective (see Objective): it needs no phi."""

    def __init__(self, config: RunConfig, prior: Prior, score: Score | None) -> None:
        self._prior, self._guidance_scale = prior, config.guidance_scale

    @torch.no_grad()
    def cotangents(self, batch: Batch) -> Cotangents:
        """See Objective."""
        noised = batch.noised
        assert noised is not None
        eps_prior = eps_pretrain(self._prior, noised.x_t, noised.t, noised.y_c, self._guidance_scale, noised.cameras)
        return of_scores(noised, sds_gradient(eps_prior, noised.eps, noised.w_t))


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
