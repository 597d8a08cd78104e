"""CLIP score, R-precision and diversity between particles, from unit vectors of pictures and texts, summed over ranks."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class ClipSums:
    """Sums over particles, from which every figure follows; their size does not grow with the number of particles.

    Attributes:
        similarity: () cosines of all views with the right text.
        hits: () views to which the right text is the nearest of all.
        embedding: (V, D) unit vectors of the particles, by view.
    """

    similarity: Tensor
    hits: Tensor
    embedding: Tensor

    @staticmethod
    def zeros(num_views: int, width: int, device: torch.device) -> ClipSums:
        """Return the sums over no particle."""
        scalar = torch.zeros((), device=device)
        return ClipSums(scalar, scalar.clone(), torch.zeros(num_views, width, device=device))

    @staticmethod
    def of(embeddings: Tensor, texts: Tensor, right: int) -> ClipSums:
        """Sum over particles.

        Args:
            embeddings: (P, V, D) unit vectors of each particle from each of V cameras, the same cameras for all.
            texts: (C, D) unit vectors; those beside the right one distract.
            right: index of the text that the particles should show.
        """
        cosines = embeddings @ texts.T
        hits = (cosines.argmax(-1) == right).sum().to(embeddings)
        return ClipSums(cosines[..., right].sum(), hits, embeddings.sum(0))


def clip_score(sums: ClipSums, num_particles: int) -> float:
    """Return the mean cosine of views and text (CLIPScore without its factor 2.5; Hessel et al. 2021)."""
    return float(sums.similarity) / (num_particles * len(sums.embedding))


def r_precision(sums: ClipSums, num_particles: int) -> float:
    """Return the share of views to which the right text is the nearest (CLIP R-precision; Park et al. 2021)."""
    return float(sums.hits) / (num_particles * len(sums.embedding))


def diversity(sums: ClipSums, num_particles: int) -> float:
    """Return 1 - the mean cosine between two particles from the same camera: 0 for copies of one another.

    For unit vectors the sum over ordered pairs of different particles is ||sum||^2 - n, so the sum over particles is enough.

    Args:
        sums: over all particles.
        num_particles: n, at least 2.
    """
    pairs = num_particles * (num_particles - 1)
    return float(1.0 - (sums.embedding.double().square().sum(1) - num_particles).mean() / pairs)
