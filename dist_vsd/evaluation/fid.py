"""Frechet distance between two sets of pictures, in the space of some features (Heusel et al. 2017), by torchmetrics.

With CLIP's or DINO's features, not Inception's: those suit pictures that are not ImageNet's better (Kynkaanniemi et al. 2022, arXiv
2203.06026; Stein et al. 2023, arXiv 2306.04675), and their weights are to be had as safetensors.
"""

from __future__ import annotations

import importlib.util

from torch import Tensor, nn


def is_available() -> bool:
    """Say whether torchmetrics is installed."""
    return importlib.util.find_spec("torchmetrics") is not None


class _AsTheyAre(nn.Module):
    """Features that were computed before."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Return ||m_1 - m_2||^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)) of the means and covariances of two sets.

    It is biased upwards for few pictures, more so the more features there are: compare sets of equal size only.

    Args:
        features: (N, D), N at least 2.
        reference: (M, D), M at least 2.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    distance = FrechetInceptionDistance(feature=_AsTheyAre(features.shape[1]))
    distance.update(reference.detach().double().cpu(), real=True)
    distance.update(features.detach().double().cpu(), real=False)
    return float(distance.compute())
