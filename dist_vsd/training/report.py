"""What one rank tells about one update."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from torch import Tensor


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

    def means(self) -> dict[str, float]:
        """Return the mean of each figure (a CPU-GPU sync), and the seconds as ``seconds/<stage>``."""
        means = {name: sum(map(float, values)) / len(values) for name, values in self.figures.items()}
        return means | {f"seconds/{name}": value for name, value in self.seconds.items()}
