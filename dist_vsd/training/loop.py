"""The loop around update(): logging, checks, checkpoints, and stopping at the same update on all ranks."""

from __future__ import annotations

import math
import resource
import time

import torch

from dist_vsd.cameras import look_at_origin
from dist_vsd.image_files import enlarge, tile, write_png
from dist_vsd.training import checkpoint
from dist_vsd.training.metrics import RankZeroReporter, Reporter, SilentReporter
from dist_vsd.training.preemption import StopRequest
from dist_vsd.training.run_directory import RunDirectory
from dist_vsd.training.state import TrainingState, phi_tensors
from dist_vsd.training.update import Report, update

PREVIEW_AZIMUTHS_DEG = (0.0, 60.0, 120.0, 180.0, 240.0, 300.0)
PREVIEW_ELEVATION_DEG = 15.0


def train(state: TrainingState, directory: RunDirectory, stop: StopRequest) -> bool:
    """Run updates until the last one or a request to stop (collective).

    Args:
        state: at its start; with ``config.resume`` it is first restored from the newest valid checkpoint.
        directory: of the run, claimed.
        stop: tells whether this process was asked to stop; one rank's word stops all at the same update.

    Returns:
        True if all updates are done, False if the run was stopped with everything saved.

    Raises:
        ValueError: --resume found no valid checkpoint.
        CheckpointError: a checkpoint could not be written.
    """
    config, collectives = state.config, state.collectives
    first, notes = _restore_newest(state, directory)
    file = directory.path / "metrics.jsonl"
    reporter: Reporter = RankZeroReporter(file, first, config.num_updates) if state.layout.rank == 0 else SilentReporter()
    for note in notes:
        reporter.event(first, note)
    reporter.advance(first)
    try:
        for index in range(first, config.num_updates):
            begin, done = time.perf_counter(), index + 1
            is_last = done == config.num_updates
            is_logged = done % config.log_every == 0 or is_last
            collectives.take_sent_bytes()  # those of logging, checks and checkpoints are not an update's
            report = _update(state, index, is_logged)
            state.residence.settle()
            stopping, has_events = collectives.any_of([stop.requested, bool(report.events or report.bad_particles)])
            if has_events:
                report.events += [mend(state, particle, directory) for particle in report.bad_particles]
                for line in events_of_all_ranks(state, report.events):
                    reporter.event(done, line)
            if is_logged:
                reporter.log(done, figures_of_all_ranks(state, report, time.perf_counter() - begin))
            if done % config.check_every == 0 or is_last:
                collectives.require_identical(f"phi after update {done}", phi_tensors(state).values())
            if done % config.checkpoint_every == 0 or is_last or stopping:
                checkpoint.save(state, directory.checkpoints, done)
            if done % config.preview_every == 0 or is_last:
                write_preview(state, directory, done)
            reporter.advance(done)
            if stopping and not is_last:
                return False
        return True
    finally:
        reporter.close()


class UpdateError(RuntimeError):
    """An update broke in a library; the last checkpoint is whole."""


def _update(state: TrainingState, index: int, measure: bool) -> Report:
    """Run one update; a ValueError inside it is no bad input of the user's."""
    try:
        return update(state, index, measure)
    except ValueError as error:
        raise UpdateError(f"update {index + 1} broke ({error}): go on from the last checkpoint with --resume") from error


def _restore_newest(state: TrainingState, directory: RunDirectory) -> tuple[int, list[str]]:
    """Restore the newest valid checkpoint if the run is resumed; return updates done and what was passed over (collective)."""
    if not state.config.resume:
        return 0, []
    found, notes = checkpoint.newest_valid(directory.checkpoints, state.config)
    state.collectives.require_equal("the newest valid checkpoint", found.update if found else None)
    if found is None:
        if notes:
            raise ValueError(f"--resume found no valid checkpoint in {directory.checkpoints}: {'; '.join(notes)}")
        return 0, ["no checkpoint was saved yet: starting from update 0"]
    checkpoint.restore(state, found)
    return found.update, [*notes, f"resumed from {found.path.name}"]


def mend(state: TrainingState, particle: int, directory: RunDirectory) -> str:
    """Put a particle whose step was skipped back to its last good state; return the line that says so.

    While its parameters and moments are finite, they are that state: the skipped step never touched them. Otherwise it is
    the newest valid checkpoint's, or the start.
    """
    owned = next(p for p in state.particles if p.id == particle)
    if all(bool(tensor.isfinite().all()) for tensor in checkpoint.particle_tensors(owned).values()):
        return f"particle {particle}: its gradient is not finite; the step is skipped, the particle is as before it"
    found, _ = checkpoint.newest_valid(directory.checkpoints, state.config)
    checkpoint.restore_particle(state, owned, found)
    return f"particle {particle}: it is not finite; it is restored from {found.path.name if found else 'its start'}"


def events_of_all_ranks(state: TrainingState, events: list[str]) -> list[str]:
    """Return the events of all ranks, each once (collective)."""
    return list(dict.fromkeys(line for rows in state.collectives.gather_json(events) for line in rows))


def figures_of_all_ranks(state: TrainingState, report: Report, seconds: float) -> dict[str, float]:
    """Return the mean of each figure over the ranks that have it, and the greatest of memory (collective)."""
    figures = report.means() | {"seconds/update": seconds, "memory/peak_mib": peak_memory_mib(state.prior.device)}
    figures["communication/sent_mib"] = state.collectives.take_sent_bytes() / 2**20
    rows = state.collectives.gather_json({k: v if math.isfinite(v) else None for k, v in figures.items()})
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if row.get(name) is not None] or [float("nan")] for name in names}
    return {name: max(v) if name.startswith("memory/") else sum(v) / len(v) for name, v in values.items()}


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory so far: allocated on the GPU, or resident in main memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@torch.no_grad()
def write_preview(state: TrainingState, directory: RunDirectory, done: int) -> None:
    """Write a grid to renders/: a row for each particle of this rank's shard, six azimuths each; one file a shard."""
    if state.layout.view_rank != 0:
        return
    camera, ones = state.config.camera, torch.ones(len(PREVIEW_AZIMUTHS_DEG))
    distance, fov = sum(camera.distance) / 2, sum(camera.fov_deg) / 2
    cameras = look_at_origin(torch.tensor(PREVIEW_AZIMUTHS_DEG), PREVIEW_ELEVATION_DEG * ones, distance * ones, fov * ones)
    cameras = cameras.to(state.prior.device)
    rows = []
    for particle in state.particles:
        state.residence.fetch([particle])
        rows.append(particle.theta.render(cameras, state.config.render_size).image.cpu())
        state.residence.release([particle])
    state.residence.settle()
    first, last = state.particles[0].id, state.particles[-1].id
    write_png(enlarge(tile(rows), 2), directory.path / "renders" / f"update_{done:08d}_particles_{first:04d}-{last:04d}.png")
