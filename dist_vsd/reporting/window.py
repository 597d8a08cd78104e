"""What is told of all updates since the last line of metrics.jsonl, rather than of the last one alone."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

# Bands of t / T by their upper ends; an update draws few t, so a band wants the updates of a whole window.
BAND_EDGES = (0.2, 0.4, 0.6, 0.8)
BAND_NAMES = ("score/gap_t0.0-0.2", "score/gap_t0.2-0.4", "score/gap_t0.4-0.6", "score/gap_t0.6-0.8", "score/gap_t0.8-1.0")

BandSums = list[tuple[float, int]]  # (sum, number of renders) of each band


class Window:
    """Collects over updates, and is emptied when a line is logged."""

    def __init__(self) -> None:
        self._gaps: list[list[tuple[Tensor, Tensor]]] = []  # a report's own lists: once it is read they hold the host's tensors
        self._num_updates, self._begin = 0, time.perf_counter()

    def add(self, gaps: list[tuple[Tensor, Tensor]]) -> None:
        """Add an update's (t / T, ||eps_pretrain - eps_phi||) of its micro-batches; they may be read later, in place."""
        self._gaps.append(gaps)
        self._num_updates += 1

    def take(self) -> tuple[BandSums, float]:
        """Return the bands' sums of this rank and the updates per second, checkpoints and all, and begin anew."""
        now = time.perf_counter()
        rate = self._num_updates / (now - self._begin)
        sums = sums_by_band([gap for gaps in self._gaps for gap in gaps])
        self._gaps, self._num_updates, self._begin = [], 0, now
        return sums, rate


def sums_by_band(gaps: Sequence[tuple[Tensor, Tensor]]) -> BandSums:
    """Sort differences of the scores by noise level.

    Args:
        gaps: pairs of (B,) t / T in [0, 1) and (B,) norms; one that is not finite is left out.

    Returns:
        (sum, number) for each of BAND_NAMES.
    """
    if not gaps:
        return [(0.0, 0)] * len(BAND_NAMES)
    t, norms = (torch.cat([pair[i] for pair in gaps]).double().cpu() for i in (0, 1))
    kept = norms.isfinite()
    bands = torch.bucketize(t[kept], torch.tensor(BAND_EDGES, dtype=torch.float64), right=True)
    number = torch.bincount(bands, minlength=len(BAND_NAMES))
    total = torch.zeros(len(BAND_NAMES), dtype=torch.float64).index_add_(0, bands, norms[kept])
    return list(zip(total.tolist(), number.tolist(), strict=True))


def means_by_band(ranks: Sequence[BandSums]) -> dict[str, float]:
    """Return the mean of each band over the renders of all ranks; bands without a render are left out."""
    means = {}
    for name, sums in zip(BAND_NAMES, zip(*ranks, strict=True), strict=True):
        count = sum(n for _, n in sums)
        if count:
            means[name] = sum(total for total, _ in sums) / count
    return means
