"""How a run begins or goes on: particles from their seed, from a checkpoint, from what the stage before has left, or from another run's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from dist_vsd.config import RunConfig
from dist_vsd.distributed.collectives import Collectives
from dist_vsd.distributed.random import keyed_generator
from dist_vsd.particles.given_mesh import read_mesh
from dist_vsd.particles.mesh import MeshParticle
from dist_vsd.particles.owned_particle import OwnedParticle
from dist_vsd.particles.particle import Particle
from dist_vsd.runs.checkpoint import Checkpoint, left_after, newest_valid, put_back, read_particle, restore, restore_particle
from dist_vsd.runs.kept_phi import put_kept_phi
from dist_vsd.runs.run_directory import RunDirectory
from dist_vsd.runs.saved_run import SavedRun, open_run
from dist_vsd.training.stages import Stage, stage_after, stage_of_checkpoint, stages_of
from dist_vsd.training.state import TrainingState, build_particle


def open_start(config: RunConfig, path: str) -> SavedRun:
    """Read the particles of another run that a stage shall begin from, on the CPU.

    Args:
        config: of the stage that begins.
        path: of the other run's directory, or RUN_DIR@STAGE: as that stage of it has left them.

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


def begun_from_mesh(config: RunConfig, particle: int) -> MeshParticle:
    """Return a mesh of a stage that begins from the user's file; ValueError if it can't."""
    row = config.representation_row
    if not row.has_surface:
        first = f"the run begins with representation {config.representation}"
        raise ValueError(f"--init-mesh begins meshes, {first}: take --preset object without its stage coarse, or --representation mesh")
    theta = build_particle(config, particle, torch.device("cpu")).theta
    assert isinstance(theta, MeshParticle)
    given = read_mesh(Path(config.init_mesh[particle % len(config.init_mesh)]), config.field.bound)
    theta.begin_from_mesh(given, is_refined=not config.trains or "distance" in config.trains)
    return theta


def check_starts(stages: list[Stage]) -> None:
    """Refuse stages that can't begin from what they are to begin from, before anything is written; ValueError in one line."""
    if len(stages) == 1 and not (stages[0].config.start_from or stages[0].config.init_mesh):
        return
    before: Particle | None = None
    for stage in stages:
        if stage.config.start_from:
            before = open_start(stage.config, stage.config.start_from).particles[0]
        started = build_particle(stage.config, 0, torch.device("cpu")).theta
        if stage.config.init_mesh:
            started = [begun_from_mesh(stage.config, number) for number in range(len(stage.config.init_mesh))][0]
        elif before is not None:
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
        elif stage.config.init_mesh:
            self.says = f"particles begin from {', '.join(stage.config.init_mesh)}"
        elif stage.first:
            self._left = left_after(checkpoints, stage.first, stage.run)
            self.says = f"stage {stage.name} begins from the particles after update {stage.first}"

    def put(self, state: TrainingState, particle: OwnedParticle) -> tuple[str, ...]:
        """Put a particle to its start, with a fresh optimiser; return what there is to tell about how it begins."""
        config = self._stage.config
        if self._other is not None:
            theta = begun_from(config, particle.id, self._other.particles[particle.id])
        elif self._left is not None:
            before = stage_of_checkpoint(stages_of(self._stage.run), self._stage.first).config
            theta = begun_from(config, particle.id, read_particle(before, particle.id, self._left))
        elif config.init_mesh:
            theta = begun_from_mesh(config, particle.id)
        else:
            theta = build_particle(config, particle.id, torch.device("cpu")).theta
        put_back(state, particle, {f"theta/{name}": tensor for name, tensor in theta.state_dict().items()})
        return theta.notes

    def put_all(self, state: TrainingState) -> list[str]:
        """Put every particle of this rank to its start, unless it is there already; return a line for each thing to tell (collective)."""
        notes = {}
        for particle in state.particles if self.says else []:
            notes[str(particle.id)] = self.put(state, particle)
        rows = state.collectives.gather_json(notes)
        told = {int(number): lines for row in rows for number, lines in row.items()}  # ranks that share a particle tell the same
        return [f"particle {number}: {line}" for number, lines in sorted(told.items()) for line in lines]


@dataclasses.dataclass(frozen=True)
class GoingOn:
    """Where a run begins or goes on.

    Attributes:
        stage: whose updates come next.
        checkpoint: the newest valid one, or None.
        notes: a line for each thing to tell about it.
    """

    stage: Stage
    checkpoint: Checkpoint | None
    notes: list[str]


def going_on(collectives: Collectives, stages: list[Stage], directory: RunDirectory) -> GoingOn:
    """Find where a run begins, or goes on if it is resumed (collective).

    Raises:
        ValueError: --resume found no valid checkpoint.
    """
    run = stages[0].run
    if not run.resume:
        return GoingOn(stages[0], None, [])
    found, notes = newest_valid(directory.checkpoints, run)
    collectives.require_equal("the newest valid checkpoint", found.update if found else None)
    if found is None:
        if notes:
            raise ValueError(f"--resume found no valid checkpoint in {directory.checkpoints}: {'; '.join(notes)}")
        return GoingOn(stages[0], None, ["no checkpoint was saved yet: starting from update 0"])
    return GoingOn(stage_after(stages, found.update), found, [*notes, f"resumed from {found.path.name}"])


def begin(state: TrainingState, directory: RunDirectory, found: Checkpoint | None = None) -> tuple[int, list[str]]:
    """Put the particles of a stage to where they begin or go on (collective).

    Args:
        state: of the stage, as it was built.
        directory: of the run, claimed.
        found: the checkpoint that the run goes on from, or None.

    Returns:
        The updates of the run that are done, and a line for each thing to tell.
    """
    if found is not None and found.update > state.stage.first:
        restore(state, found)
        return found.update, []
    start = Start(state.stage, directory.checkpoints)
    notes = [start.says, *start.put_all(state)] if start.says else []
    if kept := put_kept_phi(state, directory.checkpoints):
        notes.append(kept)
    return state.stage.first, notes


def mend(state: TrainingState, particle: int, directory: RunDirectory) -> str:
    """Put a particle whose step was skipped back to its last good state; return the line that says so.

    While its parameters and moments are finite, they are that state: the skipped step never touched them. Otherwise it is
    the newest valid checkpoint's of this stage, or the start.
    """
    owned = next(p for p in state.particles if p.id == particle)
    if all(bool(tensor.isfinite().all()) for tensor in owned.tensors().values()):
        return f"particle {particle}: its gradient is not finite; the step is skipped, the particle is as before it"
    found, _ = newest_valid(directory.checkpoints, state.stage.run)
    if found is None or found.update <= state.stage.first:  # of the stage before, if of any
        Start(state.stage, directory.checkpoints).put(state, owned)
        return f"particle {particle}: it is not finite; it is restored from its start"
    restore_particle(state, owned, found)
    return f"particle {particle}: it is not finite; it is restored from {found.path.name}"
