"""The diffusion model's own training loss, applied to a render: what DreamFusion starts from (its equation 2) and simplifies to SDS."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dist_vsd.diffusion.process import add_noise
from dist_vsd.objectives.objective import Batch, Cotangents, Objective, of_scores
from dist_vsd.priors.prior import Prior, eps_pretrain

if TYPE_CHECKING:
    from dist_vsd.config import RunConfig
    from dist_vsd.score.score import Score


class Denoising(Objective):
    """The denoising loss as an objective of theta (see Objective): it needs no phi."""

    def __init__(self, config: RunConfig, prior: Prior, score: Score | None) -> None:
        self._prior, self._guidance = prior, config.guidance

    @torch.no_grad()
    def cotangents(self, batch: Batch) -> Cotangents:
        """See Objective."""
        noised = batch.noised
        assert noised is not None
        guidance_scale = self._guidance.at(self._prior.process, noised.t, noised.x_t)

        def predict(x_t: Tensor) -> Tensor:
            return eps_pretrain(self._prior, x_t, noised.t, noised.y_c, guidance_scale, noised.cameras)

        gradient = denoising_gradient(predict, noised.x_0, noised.eps, noised.alpha_t, noised.sigma_t, noised.w_t)
        return of_scores(noised, gradient)


def denoising_gradient(
    predict: Callable[[Tensor], Tensor], x_0: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor, w_t: Tensor
) -> Tensor:
    """Return the gradient of w(t) ||eps_pretrain(x_t) - eps||^2 with respect to x_0, through the UNet: its Jacobian is kept.

    SDS leaves the Jacobian out, since it is costly and poorly conditioned at low noise (DreamFusion, section 3).

    Args:
        predict: eps_pretrain as a function of (B, ...) x_t.
        x_0: (B, ...) encoded renders.
        eps: (B, ...) noise.
        alpha_t, sigma_t: (B, 1, ...) of the noise level.
        w_t: (B, 1, ...) weights.

    Returns:
        Like x_0; to be fed to backward() at x_0.
    """
    with torch.enable_grad():
        x_0 = x_0.detach().requires_grad_()
        loss = (w_t * (predict(add_noise(x_0, eps, alpha_t, sigma_t)) - eps).square()).sum()
    (gradient,) = torch.autograd.grad(loss, x_0)
    return gradient
