"""A run as a list of stages, each with its own representation, objective, cameras and so on; a run of one stage is the common case.

A configuration names them under ``stages``, in order, each with what it changes of the run's own settings:

    stages:
      coarse: {num_updates: 400, render_size: 32}
      fine: {num_updates: 200, objective: sds, guidance_scale: 30, trains: [mlp]}

Updates are counted through the run. A stage begins from the particles that the one before it has left in its last checkpoint
(``Particle.from_particle``), or from another run's (``start_from``), with fresh optimisers and, unless it keeps one, a fresh phi.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import yaml

from dist_vsd.config import RunConfig, nearest
from dist_vsd.config_files import merge
from dist_vsd.objectives.table import OBJECTIVES
from dist_vsd.particles.representations import REPRESENTATIONS

ONLY_STAGE = "main"
# What a stage may change; the rest is the run's: its prompt, particles, layout, prior, where it is written and when.
CHANGEABLE = (
    "representation", "objective", "num_updates", "start_from", "supervise", "trains", "render_size", "micro_batch_size",
    "guidance_scale", "fine_guidance_scale", "negative_prompt", "final_lr_fraction", "lr_decay_begins", "score", "timesteps", "camera",
    "prompting", "regularization",
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

    @functools.cached_property
    def phi_goes_on(self) -> bool:
        """Whether phi is one that an earlier stage, or the run that the particles come from, has left (score.keep)."""
        if not (self.config.score.keep and self.config.objective_row.needs_phi):
            return False
        chain = [stage for stage in stages_of(self.run) if stage.first < self.first]
        has_phi = any(stage.config.objective_row.needs_phi or stage.config.start_from for stage in chain)
        return has_phi or bool(self.config.start_from)

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
        start: dict[str, Any] = {"start_from": "", "init_mesh": ()} if stages else {}
        own = dataclasses.replace(config, stages={}, num_updates=changes["num_updates"], **start)
        stages.append(Stage(name, merge(own, changes, f"stage {name}"), config, first))
    return stages


def set_in_stages(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """Change settings of single stages.

    Args:
        config: of a run with stages.
        assignments: each STAGE.NAME=VALUE, as in geometry.num_updates=300 or texture.score.lr=1e-4; the value as in YAML.

    Raises:
        ValueError: it is no assignment, or the run has no such stage. Names and values of settings are ``stages_of``'s to check.
    """
    stages = copy.deepcopy(config.stages)
    for text in assignments:
        name, equals, value = text.partition("=")
        stage, *keys = name.replace("-", "_").split(".")
        stage = stage if stage in stages else name.split(".")[0]
        if not equals or not keys:
            raise ValueError(f"--stage {text}: must be STAGE.NAME=VALUE, as in --stage geometry.num_updates=300")
        if stage not in stages:
            has = ", ".join(stages) or "none"
            raise ValueError(f"--stage {text}: the run has no stage {stage!r}{nearest(stage, stages)}, it has {has}: change --stage")
        held = stages[stage]
        for key in keys[:-1]:
            held = held.setdefault(key, {}) if isinstance(held, dict) else held
        if not isinstance(held, dict):
            raise ValueError(f"--stage {text}: {'.'.join(keys[:-1])} has no settings of its own: change --stage")
        try:
            held[keys[-1]] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--stage {text}: the value can't be read: write it as in a YAML file") from error
    counts = [changes.get("num_updates") for changes in stages.values()]
    total = {"num_updates": sum(counts)} if counts and all(isinstance(count, int) for count in counts) else {}
    return dataclasses.replace(config, stages=stages, **(total if assignments else {}))


def choose_stages(config: RunConfig, names: str) -> RunConfig:
    """Leave the stages alone that are named, in the order that the run has them.

    Args:
        config: of a run with stages.
        names: of some, with commas between them; empty: all, or those of meshes alone where the run begins from one (init_mesh).

    Raises:
        ValueError: the run has no such stage, or a stage is left without what it begins from.
    """
    if not names and config.init_mesh:
        names = ",".join(name for name, changes in config.stages.items() if changes.get("representation") == "mesh")
    if not names:
        return config
    known, chosen = list(config.stages), [name.strip() for name in names.split(",")]
    if not known:
        raise ValueError(f"--stages {names}: the run has none: take a preset that has stages, such as --preset object, or drop --stages")
    for name in chosen:
        if name not in known:
            raise ValueError(f"--stages must name some of {', '.join(known)}, got {name!r}{nearest(name, known)}: change --stages")
    numbers = sorted({known.index(name) for name in chosen})
    if numbers[0] > 0 and not (config.start_from or config.init_mesh):
        before = known[numbers[0] - 1]
        raise ValueError(f"stage {known[numbers[0]]} begins from what stage {before} leaves: name {before} too, or --start-from RUN_DIR")
    stages = {known[number]: config.stages[known[number]] for number in numbers}
    counts = [changes.get("num_updates") for changes in stages.values()]
    num_updates = sum(counts) if all(isinstance(count, int) for count in counts) else config.num_updates
    return dataclasses.replace(config, stages=stages, num_updates=num_updates)


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
