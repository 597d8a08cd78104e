"""The loop around update(): logging, checks, checkpoints, and stopping at the same update on all ranks."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

from dist_vsd.device import peak_memory_mib
from dist_vsd.distributed.collectives import Collectives
from dist_vsd.runs import checkpoint
from dist_vsd.runs.checkpoint import Checkpoint
from dist_vsd.runs.run_directory import RunDirectory
from dist_vsd.training.preemption import StopRequest
from dist_vsd.training.report import Report
from dist_vsd.training.reporter import Reporter
from dist_vsd.training.stages import Stage, stage_after
from dist_vsd.training.start import Start
from dist_vsd.training.state import TrainingState, phi_tensors
from dist_vsd.training.update import update
from dist_vsd.training.window import Window, means_by_band


def train(
    state: TrainingState, first: int, directory: RunDirectory, stop: StopRequest, reporter: Reporter, preview: Callable[[int], None]
) -> bool:
    """Run the updates of a stage until its last one or a request to stop (collective).

    Args:
        state: of the stage, after ``first`` updates of the run.
        first: see ``begin``.
        directory: of the run, claimed.
        stop: tells whether this process was asked to stop; one rank's word stops all at the same update.
        reporter: told of every update.
        preview: called after every update with the number of updates done; shows the particles when it is time to.

    Returns:
        True if all updates of the stage are done, False if the run was stopped with everything saved.

    Raises:
        CheckpointError: a checkpoint could not be written.
    """
    config, collectives, window = state.config, state.collectives, Window()
    reporter.advance(first)
    for index in range(first, state.stage.last):
        begin, done = time.perf_counter(), index + 1
        is_last = done == state.stage.last
        is_logged = done % config.log_every == 0 or is_last
        collectives.begin_update(is_timed=is_logged)
        report = _update(state, index, is_logged)
        window.add(report.gaps)
        state.placement.settle()
        stopping, has_events = collectives.any_of([stop.requested, bool(report.events or report.bad_particles)])
        if has_events:
            report.events += [mend(state, particle, directory) for particle in report.bad_particles]
            for line in events_of_all_ranks(state, report.events):
                reporter.event(done, line)
        if is_logged:
            reporter.log(done, figures_of_all_ranks(state, report, window, time.perf_counter() - begin))
        if done % config.check_every == 0 or is_last:
            collectives.require_identical(f"phi after update {done}", phi_tensors(state).values())
            tensors_by_id = {particle.id: particle.tensors().values() for particle in state.particles}
            collectives.require_same_particles(f"after update {done}", tensors_by_id)
        if done % config.checkpoint_every == 0 or is_last or stopping:
            checkpoint.save(state, directory.checkpoints, done)
        preview(done)
        reporter.advance(done)
        if stopping and not is_last:
            return False
    return True


class UpdateError(RuntimeError):
    """An update broke in a library; the last checkpoint is whole."""


def _update(state: TrainingState, index: int, measure: bool) -> Report:
    """Run one update; a ValueError inside it is no bad input of the user's."""
    try:
        return update(state, index, measure)
    except ValueError as error:
        raise UpdateError(f"update {index + 1} broke ({error}): go on from the last checkpoint with --resume") from error


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
    found, notes = checkpoint.newest_valid(directory.checkpoints, run)
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
        checkpoint.restore(state, found)
        return found.update, []
    start = Start(state.stage, directory.checkpoints)
    start.put_all(state)
    return state.stage.first, [start.says] if start.says else []


def mend(state: TrainingState, particle: int, directory: RunDirectory) -> str:
    """Put a particle whose step was skipped back to its last good state; return the line that says so.

    While its parameters and moments are finite, they are that state: the skipped step never touched them. Otherwise it is
    the newest valid checkpoint's of this stage, or the start.
    """
    owned = next(p for p in state.particles if p.id == particle)
    if all(bool(tensor.isfinite().all()) for tensor in owned.tensors().values()):
        return f"particle {particle}: its gradient is not finite; the step is skipped, the particle is as before it"
    found, _ = checkpoint.newest_valid(directory.checkpoints, state.stage.run)
    if found is None or found.update <= state.stage.first:  # of the stage before, if of any
        Start(state.stage, directory.checkpoints).put(state, owned)
        return f"particle {particle}: it is not finite; it is restored from its start"
    checkpoint.restore_particle(state, owned, found)
    return f"particle {particle}: it is not finite; it is restored from {found.path.name}"


def events_of_all_ranks(state: TrainingState, events: list[str]) -> list[str]:
    """Return the events of all ranks, each once (collective)."""
    return list(dict.fromkeys(line for rows in state.collectives.gather_json(events) for line in rows))


def figures_of_all_ranks(state: TrainingState, report: Report, window: Window, seconds: float) -> dict[str, float]:
    """Return the mean of each figure over the ranks that have it, and the greatest of memory (collective)."""
    collectives = state.collectives
    figures = report.means() | {"seconds/update": seconds, "memory/peak_mib": peak_memory_mib(state.prior.device)}
    figures["communication/sent_mib"] = collectives.sent_bytes / 2**20
    if state.phi is None or state.phi.tells_waiting:
        figures["speed/all_reduce_share"] = collectives.waited_seconds / seconds
    gaps, figures["speed/updates_per_second"] = window.take()
    rows = collectives.gather_json({"gaps": gaps, "figures": {k: v if math.isfinite(v) else None for k, v in figures.items()}})
    names = dict.fromkeys(name for row in rows for name in row["figures"])
    values = {name: [row["figures"][name] for row in rows if row["figures"].get(name) is not None] or [float("nan")] for name in names}
    means = {name: max(v) if name.startswith("memory/") else sum(v) / len(v) for name, v in values.items()}
    return means | means_by_band([row["gaps"] for row in rows])
