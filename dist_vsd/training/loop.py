"""The loop around update(): logging, checks, checkpoints, and stopping at the same update on all ranks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dist_vsd.device import is_accelerator
from dist_vsd.priors.compiled import compilations
from dist_vsd.runs import checkpoint
from dist_vsd.runs.run_directory import RunDirectory
from dist_vsd.runs.start import mend
from dist_vsd.runs.stop_request import StopRequest
from dist_vsd.training.report import Listener, Report, any_skipped, read
from dist_vsd.training.state import TrainingState, phi_tensors
from dist_vsd.training.update import update


def train(
    state: TrainingState, first: int, directory: RunDirectory, stop: StopRequest, listener: Listener, preview: Callable[[int], None]
) -> bool:
    """Run the updates of a stage until its last one or a request to stop (collective).

    Args:
        state: of the stage, after ``first`` updates of the run.
        first: see ``runs.start.begin``.
        directory: of the run, claimed.
        stop: tells whether this process was asked to stop; one rank's word stops all at the same update.
        listener: told of every update.
        preview: called after every update with the number of updates done; shows the particles when it is time to.

    Returns:
        True if all updates of the stage are done, False if the run was stopped with everything saved.

    Raises:
        CheckpointError: a checkpoint could not be written.
    """
    config, collectives = state.config, state.collectives
    unread: list[Report] = []  # of updates that a device may not have come to the end of
    listener.advance(first)
    for index in range(first, state.stage.last):
        done = index + 1
        is_last = done == state.stage.last
        is_logged = done % config.log_every == 0 or is_last
        collectives.begin_update(is_timed=is_logged)
        report = _update(state, index, is_logged)
        unread.append(report)
        for line in compilations.news():  # what an update compiles is told by it: blocks are, when they meet a shape first
            listener.event(done, line)
        is_saved = done % config.checkpoint_every == 0 or stop.requested  # what was saved shall be mended first
        if is_logged or is_saved or not is_accelerator(state.prior.device):
            read(unread)  # the one wait of an update, if it has one
        stopping, has_faults = collectives.any_of([stop.requested, any_fault(state, unread)])
        if has_faults:
            for line in events_of_all_ranks(state, mended(state, unread, directory)):
                listener.event(done, line)
        unread = [] if report.is_read else unread
        listener.updated(done, report, is_logged)
        if is_last or stopping or any(done % every == 0 for every in (config.check_every, config.checkpoint_every, config.preview_every)):
            state.placement.settle()
        if done % config.check_every == 0 or is_last:
            collectives.require_identical(f"phi after update {done}", phi_tensors(state).values())
            tensors_by_id = {particle.id: particle.tensors().values() for particle in state.particles}
            collectives.require_same_particles(f"after update {done}", tensors_by_id)
        if done % config.checkpoint_every == 0 or is_last or stopping:
            checkpoint.save(state, directory.checkpoints, done)
        preview(done)
        listener.advance(done)
        if stopping and not is_last:
            return False
    return True


def any_fault(state: TrainingState, unread: list[Report]) -> Tensor | bool:
    """Return whether something was skipped on this rank: as far as is known, or as the device knows where ranks agree on it."""
    if unread[-1].is_read:
        return any(report.events or report.bad_particles for report in unread)
    return any_skipped(unread) if state.layout.world_size > 1 else False  # alone, one learns of it when a line is logged


def mended(state: TrainingState, unread: list[Report], directory: RunDirectory) -> list[str]:
    """Mend particles whose step was skipped; return a line for each thing that happened on this rank."""
    read(unread)
    bad = dict.fromkeys(particle for report in unread for particle in report.bad_particles)
    events = [line for report in unread for line in report.events]
    return [*events, *(mend(state, particle, directory) for particle in bad)]


class UpdateError(RuntimeError):
    """An update broke in a library; the last checkpoint is whole."""


def _update(state: TrainingState, index: int, measure: bool) -> Report:
    """Run one update; a ValueError inside it is no bad input of the user's."""
    try:
        report = update(state, index, measure)
        report.stopwatch.stop()
        return report
    except ValueError as error:
        raise UpdateError(f"update {index + 1} broke ({error}): go on from the last checkpoint with --resume") from error


def events_of_all_ranks(state: TrainingState, events: list[str]) -> list[str]:
    """Return the events of all ranks, each once (collective)."""
    return list(dict.fromkeys(line for rows in state.collectives.gather_json(events) for line in rows))
