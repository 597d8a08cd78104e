"""How spread out predictions are: entropies in bits, and the distance of two distributions of labels."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy_bits(probabilities: Tensor) -> Tensor:
    """Return H[p] = -sum p log2 p of (..., C) distributions; (...), in [0, log2 C] bits."""
    return torch.special.entr(probabilities).sum(-1) / torch.log(torch.tensor(2.0))


def quality_bits(predictions: Tensor) -> Tensor:
    """Return the mean entropy of a classifier's predictions for single pictures: low where each shows one thing clearly.

    With ``variety_bits`` the two halves of the inception score (Salimans et al. 2016), taken apart as "inception quality" and "inception
    variety" by Wang et al. 2024 (Taming Mode Collapse in Score Distillation, arXiv 2401.00909). Their classifier is Inception's, ours
    CLIP over a set of texts.

    Args:
        predictions: (..., C) probabilities, a row for each picture.
    """
    return entropy_bits(predictions).mean()


def variety_bits(predictions: Tensor) -> Tensor:
    """Return the entropy of the mean prediction over all pictures: high where they show different things; see quality_bits."""
    return entropy_bits(predictions.flatten(0, -2).mean(0))


def entropy_of_counts_bits(counts: Tensor) -> float:
    """Return the entropy of the shares of (C,) labels; 0 of nothing."""
    return float(entropy_bits(counts.double() / counts.sum().clamp_min(1)))


def expected_entropy_bits(counts: Tensor, num_draws: int) -> float:
    """Return the mean of ``entropy_of_counts_bits`` over all choices of ``num_draws`` of the labels that were counted.

    Few labels have a lower entropy than many of the same distribution (log2 n bounds it), so n particles are compared with what n
    samples would show, not with what many samples show. Exact: the count of each label in a choice is hypergeometric.

    Args:
        counts: (C,) how often each label was seen, N in all.
        num_draws: n; where it is above N, all are taken.
    """
    from scipy.stats import hypergeom  # half a second, which every run that previews its particles would pay

    total = int(counts.sum())
    n = min(num_draws, total)
    if n == 0:
        return 0.0
    share = torch.arange(n + 1, dtype=torch.float64) / n
    terms = torch.special.entr(share) / torch.log(torch.tensor(2.0, dtype=torch.float64))
    chances = [torch.from_numpy(hypergeom.pmf(range(n + 1), total, int(count), n)) for count in counts.tolist()]
    return float(sum(chance @ terms for chance in chances))


def total_variation(one: Tensor, other: Tensor) -> float:
    """Return half the absolute difference of the shares that (C,) counts stand for: 0 for the same, 1 where nothing is shared."""
    shares = [counts.double() / counts.sum().clamp_min(1) for counts in (one, other)]
    return float((shares[0] - shares[1]).abs().sum() / 2)
