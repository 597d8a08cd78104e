"""How particles begin: from their seed, from what the stage before has left, or from another run's."""

from __future__ import annotations

from pathlib import Path

import torch

from dist_vsd.config import RunConfig
from dist_vsd.distributed.random import keyed_generator
from dist_vsd.particles.owned_particle import OwnedParticle
from dist_vsd.particles.particle import Particle
from dist_vsd.runs.checkpoint import Checkpoint, left_after, put_back, read_particle
from dist_vsd.runs.saved_run import SavedRun, open_run
from dist_vsd.training.stages import Stage, stage_of_checkpoint, stages_of
from dist_vsd.training.state import TrainingState, build_particle


def open_start(config: RunConfig, path: str) -> SavedRun:
    """Read the particles of another run that a stage shall begin from, on the CPU.

    Args:
        config: of the stage that begins.
        path: of the other run's directory.

    Raises:
        ValueError: there is no such run, it has fewer particles, or its particles are of another kind or other sizes.
    """
    try:
        saved = open_run(Path(path))
    except ValueError as error:
        raise ValueError(f"--start-from: {error}") from error
    if saved.config.num_particles < config.num_particles:
        raise ValueError(
            f"--start-from {path} has {saved.config.num_particles} particle(s), the run wants {config.num_particles}: lower --num-particles"
        )
    for particle in range(config.num_particles):
        begun_from(config, particle, saved.particles[particle])
    return saved


def begun_from(config: RunConfig, particle: int, other: Particle) -> Particle:
    """Return a particle of a stage that begins from another one; ValueError if it can't."""
    row = config.representation_row
    generator = keyed_generator(config.seed, "initialize_theta", particle=particle)
    return row.particle_class().from_particle(row.settings(config), other, generator)


def check_starts(stages: list[Stage]) -> None:
    """Refuse stages that can't begin from what they are to begin from, before anything is written; ValueError in one line."""
    if len(stages) == 1 and not stages[0].config.start_from:
        return
    before: Particle | None = None
    for stage in stages:
        if stage.config.start_from:
            before = open_start(stage.config, stage.config.start_from).particles[0]
        started = build_particle(stage.config, 0, torch.device("cpu")).theta
        if before is not None:
            try:
                started = begun_from(stage.config, 0, before)
            except ValueError as error:
                raise ValueError(f"{error} (stage {stage.name})" if len(stages) > 1 else str(error)) from error
        before = started


class Start:
    """Where the particles of a stage begin.

    Args:
        stage: of the run.
        checkpoints: folder of the run's.

    Attributes:
        says: a line for the log; empty where they begin from their seed.

    Raises:
        ValueError: what they are to begin from can't be read.
    """

    def __init__(self, stage: Stage, checkpoints: Path) -> None:
        self._stage, self.says = stage, ""
        self._other: SavedRun | None = None
        self._left: Checkpoint | None = None
        if stage.config.start_from:
            self._other = open_start(stage.config, stage.config.start_from)
            self.says = f"particles begin as {stage.config.start_from} has them after update {self._other.update}"
        elif stage.first:
            self._left = left_after(checkpoints, stage.first, stage.run)
            self.says = f"stage {stage.name} begins from the particles after update {stage.first}"

    def put(self, state: TrainingState, particle: OwnedParticle) -> None:
        """Put a particle to its start, with a fresh optimiser."""
        config = self._stage.config
        if self._other is not None:
            theta = begun_from(config, particle.id, self._other.particles[particle.id])
        elif self._left is not None:
            before = stage_of_checkpoint(stages_of(self._stage.run), self._stage.first).config
            theta = begun_from(config, particle.id, read_particle(before, particle.id, self._left))
        else:
            theta = build_particle(config, particle.id, torch.device("cpu")).theta
        put_back(state, particle, {f"theta/{name}": tensor for name, tensor in theta.state_dict().items()})

    def put_all(self, state: TrainingState) -> None:
        """Put every particle of this rank to its start, unless it is there already."""
        for particle in state.particles if self.says else []:
            self.put(state, particle)
