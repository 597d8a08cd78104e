"""Guidance: how predictions for several texts become one. Pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Weights of Perp-Neg's negatives, -(a exp(-b r) + c) of the share r of a view: (a, b, c), as threestudio sets them.
SIDE_BEFORE_BACK, FRONT_BEFORE_BACK = (1.0, 0.5, -0.606), (1.0, 0.5, 0.967)
FRONT_BEFORE_SIDE, SIDE_BEFORE_FRONT = (4.0, 0.5, -2.426), (4.0, 0.5, -2.426)


def classifier_free_guidance(eps_uncond: Tensor, eps_cond: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Eps = eps_uncond + s (eps_cond - eps_uncond) (Ho and Salimans 2022; s = 1 is no guidance)."""
    return eps_uncond + guidance_scale * (eps_cond - eps_uncond)


def perpendicular(x: Tensor, y: Tensor) -> Tensor:
    """Return the part of each of (B, ...) x that is perpendicular to y; x itself where y is zero."""
    axes = tuple(range(1, x.ndim))
    along = (x * y).sum(axes, keepdim=True) / y.square().sum(axes, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)
    return x - along * y


def perp_neg(
    eps_uncond: Tensor, eps_cond: Tensor, eps_negatives: Sequence[Tensor], weights: Tensor, guidance_scale: float | Tensor
) -> Tensor:
    """Steer away from negative texts only where that does not undo the prompt (Perp-Neg; Armandpour et al. 2023).

    Eps = eps_uncond + s (e + sum_i w_i perp(e_i, e)), where e = eps_cond - eps_uncond and e_i = eps_negative_i - eps_uncond.

    Args:
        eps_uncond, eps_cond: (B, ...) predictions.
        eps_negatives: N of them.
        weights: (N, B), negative or zero.
        guidance_scale: s.
    """
    direction = eps_cond - eps_uncond
    total = direction
    for eps_negative, weight in zip(eps_negatives, weights, strict=True):
        total = total + weight.to(total).reshape(-1, *[1] * (total.ndim - 1)) * perpendicular(eps_negative - eps_uncond, direction)
    return eps_uncond + guidance_scale * total


def decay(coefficients: tuple[float, float, float], share: Tensor) -> Tensor:
    """Return -(a exp(-b r) + c), the weight of a negative text where its view's neighbour has the share r."""
    a, b, c = coefficients
    return -(a * torch.exp(-b * share) + c)
