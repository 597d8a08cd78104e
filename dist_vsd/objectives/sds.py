"""Score distillation sampling (DreamFusion, equation 3): VSD with the particles' distribution a point mass."""

from __future__ import annotations

from torch import Tensor


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
