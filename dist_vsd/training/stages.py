"""A run as a list of stages, each with its own representation, objective, cameras and so on; a run of one stage is the common case.

A configuration names them under ``stages``, in order, each with what it changes of the run's own settings:

    stages:
      coarse: {num_updates: 400, render_size: 32}
      fine: {num_updates: 200, objective: sds, guidance_scale: 30, trains: [mlp]}

Updates are counted through the run. A stage begins from the particles that the one before it has left in its last checkpoint
(``Particle.from_particle``), or from another run's (``start_from``), with fresh optimisers and a fresh phi.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dist_vsd.config import RunConfig, nearest
from dist_vsd.config_files import merge
from dist_vsd.objectives.table import OBJECTIVES
from dist_vsd.particles.representations import REPRESENTATIONS

ONLY_STAGE = "main"
# What a stage may change; the rest is the run's: its prompt, particles, layout, prior, where it is written and when.
CHANGEABLE = (
    "representation", "objective", "num_updates", "start_from", "supervise", "trains", "render_size", "micro_batch_size",
    "guidance_scale", "negative_prompt", "final_lr_fraction", "lr_decay_begins", "score", "timesteps", "camera", "prompting",
    "regularization",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: of the stage.
        config: the run's, with what the stage changes; its num_updates are the stage's own.
        run: the run's configuration as it was given.
        first: update of the run at which the stage begins, from 0.
    """

    name: str
    config: RunConfig
    run: RunConfig
    first: int = 0

    @staticmethod
    def whole(config: RunConfig) -> Stage:
        """Return the one stage of a run that names none."""
        return Stage(ONLY_STAGE, config, config)

    @property
    def last(self) -> int:
        """Updates of the run that are done when the stage is."""
        return self.first + self.config.num_updates

    def progress(self, index: int) -> float:
        """Return how much of the stage is done before an update of the run, in [0, 1)."""
        return (index - self.first) / self.config.num_updates


def stages_of(config: RunConfig) -> list[Stage]:
    """Return the stages of a run, in order.

    Raises:
        ValueError: a stage changes what it can't, or to what can't be.
    """
    if not config.stages:
        return [Stage.whole(config)]
    sections = [row.section for row in (*REPRESENTATIONS.values(), *OBJECTIVES.values()) if row.section]
    stages: list[Stage] = []
    for name, changes in config.stages.items():
        _check(name, changes, (*CHANGEABLE, *sections))
        first = stages[-1].last if stages else 0
        start = {"start_from": ""} if stages else {}
        own = dataclasses.replace(config, stages={}, num_updates=changes["num_updates"], **start)
        stages.append(Stage(name, merge(own, changes, f"stage {name}"), config, first))
    return stages


def _check(name: str, changes: Any, known: tuple[str, ...]) -> None:
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ValueError(f"the name of a stage must be letters, digits, - and _, got {name!r}: rename it")
    if not isinstance(changes, dict) or not isinstance(changes.get("num_updates"), int) or changes["num_updates"] < 1:
        raise ValueError(f"stage {name} must say its num_updates, at least 1: write stages: {{{name}: {{num_updates: 400, ...}}}}")
    for key in changes:
        if key not in known:
            listed = ", ".join(known)
            raise ValueError(f"stage {name} can't change {key!r}{nearest(str(key), known)}, which is the run's: it may change {listed}")


def stage_after(stages: list[Stage], num_done: int) -> Stage:
    """Return the stage that goes on after some updates of the run: the last one if all are done."""
    return next((stage for stage in stages if num_done < stage.last), stages[-1])


def stage_of_checkpoint(stages: list[Stage], update: int) -> Stage:
    """Return the stage that left a checkpoint after some updates of the run."""
    return next((stage for stage in stages if update <= stage.last), stages[-1])
