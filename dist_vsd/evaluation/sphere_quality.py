"""T3Bench's quality of a 3D object: the best score from all around, smoothed over neighbouring viewpoints."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_CONVOLUTIONS = 3


def sphere_quality(scores: Tensor, neighbours: list[list[int]]) -> float:
    """Return the quality that T3Bench gives an object (He et al. 2023, arXiv 2310.02977; its run_eval_quality.py).

    Each viewpoint has the score of its best focal length. Three times, each is replaced by the mean of itself and its neighbours on the
    icosphere ("regional convolution"), so that a single lucky view does not count; then the best is taken. T3Bench scores by ImageReward;
    here it is whatever the scores are of, such as CLIP's cosine with the prompt.

    Args:
        scores: (N, F) of N viewpoints at F focal lengths.
        neighbours: of each viewpoint.
    """
    smoothing = torch.eye(len(neighbours), dtype=torch.float64)
    for viewpoint, others in enumerate(neighbours):
        smoothing[viewpoint, others] = 1.0
    smoothing /= smoothing.sum(1, keepdim=True)
    best = scores.double().amax(1).cpu()
    for _ in range(NUM_CONVOLUTIONS):
        best = smoothing @ best
    return float(best.max())
