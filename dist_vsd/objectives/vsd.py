"""Variational score distillation (ProlificDreamer, equation 9) and the loss that teaches phi (equation 8)."""

from __future__ import annotations

from torch import Tensor


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


def phi_loss(eps_phi: Tensor, eps: Tensor) -> Tensor:
    """Return each render's denoising loss, mean ||eps_phi(x_t') - eps'||^2 over its coordinates.

    Args:
        eps_phi, eps: (B, ...).

    Returns:
        (B,); the gradient flows to phi.
    """
    return (eps_phi - eps).square().flatten(1).mean(1)
