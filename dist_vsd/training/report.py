"""What one rank tells about one update, and whom the loop tells it."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Protocol

import torch
from torch import Tensor

from dist_vsd.objectives.objective import Cotangents
from dist_vsd.particles.particle import Render


@dataclasses.dataclass
class Report:
    """What one rank tells about one update.

    Attributes:
        seconds: by stage.
        figures: gradient norms, phi's loss, opacity; each a list over particles, views or steps, of numbers or of tensors on the
            device, which means() reads.
        gaps: of each micro-batch, (B,) t / T and (B,) ||eps_pretrain - eps_phi||, on the device; empty without eps_phi.
        events: what went wrong and was mended, a line each.
        bad_particles: ids of particles whose step was skipped because their gradient was not finite.
    """

    seconds: dict[str, float]
    figures: dict[str, list[float | Tensor]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    gaps: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list)
    events: list[str] = dataclasses.field(default_factory=list)
    bad_particles: list[int] = dataclasses.field(default_factory=list)

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
        """Return the mean of each figure (a CPU-GPU sync), and the seconds as ``seconds/<stage>``."""
        means = {name: sum(map(float, values)) / len(values) for name, values in self.figures.items()}
        return means | {f"seconds/{name}": value for name, value in self.seconds.items()}


class Listener(Protocol):
    """What the loop tells of its updates; reporting/ makes figures of it, writes them down and shows them."""

    def updated(self, update: int, report: Report, seconds: float, is_logged: bool) -> None:
        """Take in what this rank tells of an update (collective where it is logged).

        Args:
            update: updates of the run that are done.
            report: of the last one.
            seconds: that it took.
            is_logged: whether its figures are to be recorded; the same on all ranks.
        """
        ...

    def event(self, update: int, text: str) -> None:
        """Record something that happened."""
        ...

    def advance(self, update: int) -> None:
        """Show that ``update`` updates are done."""
        ...
