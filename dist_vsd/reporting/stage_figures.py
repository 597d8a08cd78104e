"""The figures of a stage's updates over all ranks, on their way from the loop to a reporter."""

from __future__ import annotations

import math

from dist_vsd.device import peak_memory_mib
from dist_vsd.reporting.reporter import Reporter
from dist_vsd.reporting.window import Window, means_by_band
from dist_vsd.training.report import Report
from dist_vsd.training.state import TrainingState


class StageFigures:
    """Gathers what every rank tells of its updates, and hands the means to a reporter (a Listener of the loop).

    Args:
        state: of the stage, on this rank.
        reporter: of this rank; all but rank 0's are silent.
    """

    def __init__(self, state: TrainingState, reporter: Reporter) -> None:
        self._state, self._reporter, self._window = state, reporter, Window()
        self.event, self.advance = reporter.event, reporter.advance

    def updated(self, update: int, report: Report, is_logged: bool) -> None:
        """See Listener."""
        self._window.add(report.gaps)
        if is_logged:
            self._reporter.log(update, figures_of_all_ranks(self._state, report, self._window))


def figures_of_all_ranks(state: TrainingState, report: Report, window: Window) -> dict[str, float]:
    """Return the mean of each figure over the ranks that have it, and the greatest of memory (collective)."""
    collectives = state.collectives
    figures = report.means() | {"memory/peak_mib": peak_memory_mib(state.prior.device)}
    figures["communication/sent_mib"] = collectives.sent_bytes / 2**20
    if state.phi is None or state.phi.tells_waiting:
        figures["speed/all_reduce_share"] = collectives.waited_seconds / figures["seconds/update"]
    gaps, figures["speed/updates_per_second"] = window.take()
    rows = collectives.gather_json({"gaps": gaps, "figures": {k: v if math.isfinite(v) else None for k, v in figures.items()}})
    names = dict.fromkeys(name for row in rows for name in row["figures"])
    values = {name: [row["figures"][name] for row in rows if row["figures"].get(name) is not None] or [float("nan")] for name in names}
    means = {name: max(v) if name.startswith("memory/") else sum(v) / len(v) for name, v in values.items()}
    return means | means_by_band([row["gaps"] for row in rows])
