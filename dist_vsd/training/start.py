"""How particles begin where it is not from their seed: from another run's."""

from __future__ import annotations

from pathlib import Path

import torch

from dist_vsd.config import RunConfig
from dist_vsd.distributed.random import keyed_generator
from dist_vsd.runs.saved_run import SavedRun, open_run
from dist_vsd.training.state import TrainingState


def open_start(config: RunConfig, path: str) -> SavedRun:
    """Read the particles of another run that a run shall begin from, on the CPU.

    Args:
        config: of the run that begins.
        path: of the other run's directory.

    Raises:
        ValueError: there is no such run, it has fewer particles, or its particles are of another kind or other sizes.
    """
    saved = open_run_named(path)
    if saved.config.num_particles < config.num_particles:
        raise ValueError(
            f"--start-from {path} has {saved.config.num_particles} particle(s), the run wants {config.num_particles}: lower --num-particles"
        )
    row = config.representation_row
    for particle in range(config.num_particles):
        row.particle_class().from_particle(row.settings(config), saved.particles[particle], torch.Generator())
    return saved


def open_run_named(path: str) -> SavedRun:
    """Open a run, and name the flag where it can't be."""
    try:
        return open_run(Path(path))
    except ValueError as error:
        raise ValueError(f"--start-from: {error}") from error


def start_particles(state: TrainingState, path: str) -> int:
    """Let every particle of this rank begin as another run's has ended; return the updates that that one had done.

    Args:
        state: at its start.
        path: of the other run's directory, checked by ``open_start``.
    """
    saved, row = open_run_named(path), state.config.representation_row
    for particle in state.particles:
        generator = keyed_generator(state.config.seed, "initialize_theta", particle=particle.id)
        started = row.particle_class().from_particle(row.settings(state.config), saved.particles[particle.id], generator)
        state.placement.fetch([particle])
        particle.restore({f"theta/{name}": tensor for name, tensor in started.state_dict().items()})
        state.placement.release([particle])
    state.placement.settle()
    return saved.update
