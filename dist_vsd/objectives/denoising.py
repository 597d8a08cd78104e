"""The diffusion model's own training loss, applied to a render: what DreamFusion starts from (its equation 2) and simplifies to SDS."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dist_vsd.diffusion.process import add_noise


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
