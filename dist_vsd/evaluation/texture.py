"""Blotches and copies, which classifiers and distances between means of features miss: fine texture, and the nearest of other pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def finest_octave(pictures: Tensor) -> float:
    """Return the root mean square of what pictures lose when they are halved: their texture between two and four pixels wide.

    Noise that no score sees stays there: of pictures that are clean it is as high as of the samples of a prior, of blotchy ones higher,
    of blurred ones lower.

    Args:
        pictures: (N, C, H, W) of any range, or latents; H and W even.
    """
    halved = nn.functional.avg_pool2d(pictures, 2)
    return float((pictures - nn.functional.interpolate(halved, scale_factor=2, mode="nearest")).square().mean().sqrt())


def nearest_distance(embedding: Tensor, others: Tensor) -> float:
    """Return 1 - the cosine with the nearest of other pictures, the mean over pictures: near 0 for copies, high for what resembles none.

    Args:
        embedding: (N, D) of pictures, of unit length.
        others: (M, D).
    """
    return float((1 - embedding @ others.T).amin(1).mean())


def nearest_distance_of_themselves(embedding: Tensor) -> float:
    """Return the same of pictures and the rest of their own set: what new ones of the same distribution would have."""
    cosine = embedding @ embedding.T
    return float((1 - cosine.masked_fill(torch.eye(len(cosine), dtype=torch.bool, device=cosine.device), -1.0)).amin(1).mean())
