"""The Janus rate of a sweep: the share of particles whose front is seen from more than one side, of the runs that were evaluated."""

from __future__ import annotations

import dataclasses
import json

from dist_vsd.evaluation.metric_names import EVALUATION_FILE, METRICS
from dist_vsd.sweep.manifest import Sweep
from dist_vsd.sweep.state import RunState

(RATE,) = METRICS["multi_face"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Faces:
    """What the evaluations of a sweep's runs found of faces.

    Attributes:
        runs: that were evaluated for them.
        particles: of these runs.
        with_more: of these particles, those with more than one face.
        outdated: of these runs, those that have a newer checkpoint than was evaluated.
    """

    runs: int
    particles: int
    with_more: int
    outdated: int

    @property
    def rate(self) -> float:
        """The share of particles with more than one face."""
        return self.with_more / self.particles

    def line(self) -> str:
        """Return the rate as one line."""
        of = f"{self.with_more} of {self.particles} particle(s) of {self.runs} evaluated run(s)"
        text = f"Janus rate: {self.rate:.0%} ({of} have more than one face)"
        return f"{text}; {self.outdated} of these runs went on since" if self.outdated else text

    def to_json(self) -> dict[str, float]:
        """Return the rate and what it is of as plain values."""
        return {"rate": self.rate, **dataclasses.asdict(self)}


def faces_of(sweep: Sweep, states: dict[str, RunState]) -> Faces | None:
    """Read evaluation.json of each run; None where none tells of faces, as of flat particles, or without a CLIP.

    Args:
        sweep: read from its directory.
        states: of every run, by its id.
    """
    found = []
    for run in sweep.runs:
        try:
            record = json.loads((sweep.run_dir(run) / EVALUATION_FILE).read_text())
            rate, num_particles, update = record["figures"][RATE], int(record["num_particles"]), int(record["update"])
            found.append((num_particles, round(rate * num_particles), states[run.id].update > update))
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or of other metrics
            continue
    particles, with_more, outdated = (sum(column) for column in zip(*found, strict=True)) if found else (0, 0, 0)
    return Faces(runs=len(found), particles=particles, with_more=with_more, outdated=outdated) if particles else None
