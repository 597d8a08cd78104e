"""What one rank tells about one update, and whom the loop tells it."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dist_vsd.device import read_together
from dist_vsd.objectives.objective import Cotangents
from dist_vsd.particles.particle import Render
from dist_vsd.stopwatch import Stopwatch


@dataclasses.dataclass
class Skip:
    """A step that may have been skipped, as its gradient was not finite: the device decides it, and nobody waits to know.

    Attributes:
        flag: whether it was, () bool on the device.
        particle: whose step it was; None: phi's.
        tell: makes the line that says so, for phi's.
    """

    flag: Tensor
    particle: int | None = None
    tell: Callable[[], str] | None = None


@dataclasses.dataclass
class Report:
    """What one rank tells about one update.

    Attributes:
        stopwatch: of its stages.
        figures: gradient norms, phi's loss, opacity; each a list over particles, views or steps, of numbers or of tensors, on the
            device until they are read.
        gaps: of each micro-batch, (B,) t / T and (B,) ||eps_pretrain - eps_phi||, likewise; empty without eps_phi.
        skips: steps that may have been skipped.
        events: what went wrong and was mended, a line each; known once the report is read.
        bad_particles: ids of particles whose step was skipped because their gradient was not finite; likewise.
        is_read: whether ``read`` was called.
    """

    stopwatch: Stopwatch
    figures: dict[str, list[float | Tensor]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    gaps: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list)
    skips: list[Skip] = dataclasses.field(default_factory=list)
    events: list[str] = dataclasses.field(default_factory=list)
    bad_particles: list[int] = dataclasses.field(default_factory=list)
    is_read: bool = False

    def add(self, cotangents: Cotangents, renders: list[Render], noise_level: Tensor | None) -> None:
        """Take in a micro-batch.

        Args:
            cotangents: of the objective.
            renders: B of them.
            noise_level: (B,) t / T, or None where nothing was noised.
        """
        for name, figure in cotangents.figures.items():
            self.figures[name].append(figure)
        if cotangents.score_gap is not None and noise_level is not None:
            self.gaps.append((noise_level, cotangents.score_gap))
        self.figures["theta/opacity"].append(torch.stack([render.opacity.mean() for render in renders]).mean().detach())

    def means(self) -> dict[str, float]:
        """Return the mean of each figure, and the seconds of each stage as ``seconds/<stage>``; read it first, or it waits for each."""
        means = {name: sum(map(float, values)) / len(values) for name, values in self.figures.items()}
        return means | {f"seconds/{name}": value for name, value in self.stopwatch.seconds().items()}


def any_skipped(reports: Sequence[Report]) -> Tensor | bool:
    """Return whether any step was skipped in some updates, on the device."""
    flags = [skip.flag for report in reports for skip in report.skips]
    return torch.stack(flags).any() if flags else False


def read(reports: Sequence[Report]) -> None:
    """Bring what some updates tell from the device to the host, all of it in one copy (a CPU-GPU sync)."""
    unread = [report for report in reports if not report.is_read]
    tensors = [value for report in unread for values in report.figures.values() for value in values if isinstance(value, Tensor)]
    tensors += [part for report in unread for gap in report.gaps for part in gap]
    tensors += [skip.flag for report in unread for skip in report.skips]
    numbers = iter(read_together(tensors))
    for report in unread:
        for values in report.figures.values():
            values[:] = [float(next(numbers)) if isinstance(value, Tensor) else value for value in values]
    for report in unread:
        report.gaps[:] = [(next(numbers), next(numbers)) for _ in report.gaps]
    for report in unread:
        skipped = [skip for skip in report.skips if bool(next(numbers))]
        report.bad_particles += [skip.particle for skip in skipped if skip.particle is not None]
        report.events += [skip.tell() for skip in skipped if skip.tell is not None]
        report.is_read = True


class Listener(Protocol):
    """What the loop tells of its updates; reporting/ makes figures of it, writes them down and shows them."""

    def updated(self, update: int, report: Report, is_logged: bool) -> None:
        """Take in what this rank tells of an update (collective where it is logged).

        Args:
            update: updates of the run that are done.
            report: of the last one; those since the last line were read if this one is logged.
            is_logged: whether its figures are to be recorded; the same on all ranks.
        """
        ...

    def event(self, update: int, text: str) -> None:
        """Record something that happened."""
        ...

    def advance(self, update: int) -> None:
        """Show that ``update`` updates are done."""
        ...
