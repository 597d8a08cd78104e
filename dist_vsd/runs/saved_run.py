"""Reading the particles of a run back, for whoever looks at them afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dist_vsd.config import RunConfig
from dist_vsd.config_files import merge
from dist_vsd.particles.particle import Particle
from dist_vsd.priors.table import load_prior
from dist_vsd.runs.checkpoint import SHOWN, newest_valid, read_particle, with_particles
from dist_vsd.runs.run_directory import RunDirectory, split_stage
from dist_vsd.training.stages import stage_of_checkpoint, stages_of


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A run as its newest valid checkpoint has it, or the one that was asked for.

    Attributes:
        path: the run directory.
        config: of the run, and of the stage that it has come to.
        update: updates done.
        particles: by id.
        notes: checkpoints that were passed over, and why.
        decode: from x_0 to pictures, for latent particles; else None.
    """

    path: Path
    config: RunConfig
    update: int
    particles: dict[int, Particle]
    notes: list[str]
    decode: Callable[[Tensor], Tensor] | None = None


def update_after(path: Path, config: RunConfig, name: str) -> int:
    """Return the updates of a run after which a stage ends.

    Raises:
        ValueError: the run has no such stage.
    """
    stages = {stage.name: stage for stage in stages_of(config)}
    if name not in stages:
        raise ValueError(f"{path} has no stage {name!r}, it has {', '.join(stages)}: change what stands after the @")
    return stages[name].last


def read_config(path: Path) -> RunConfig:
    """Return the configuration of the run in a directory.

    Raises:
        ValueError: there is none.
    """
    if not path.is_dir():
        raise ValueError(f"run directory {path} does not exist: check the path")
    saved = RunDirectory(path).saved_config()
    if saved is None:
        raise ValueError(f"{path} holds no run (config.yaml is missing): give the directory that `dist-vsd train` made")
    return merge(RunConfig(), saved, str(path / "config.yaml"))


def check_particles(path: Path, config: RunConfig, particles: tuple[int, ...]) -> None:
    """Refuse ids that a run does not have.

    Raises:
        ValueError: one of them.
    """
    for particle in particles:
        if not 0 <= particle < config.num_particles:
            raise ValueError(f"{path} has no particle {particle}: its ids are 0 to {config.num_particles - 1}")


def open_run(
    path: Path,
    particles: tuple[int, ...] = (),
    device: torch.device | str = "cpu",
    update: int | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> SavedRun:
    """Read particles from a checkpoint of a run; nothing is written or locked.

    Args:
        path: the run directory, or RUN_DIR@STAGE: as that stage has left the particles.
        particles: ids; empty for all.
        device: to put them on.
        update: of the checkpoint, of which nothing but the particles has to be whole; by default the newest that is valid.
        decode: from x_0 to pictures, where the caller has the prior already.

    Raises:
        ValueError: no run, no valid checkpoint, or no such particle.
    """
    path, stage = split_stage(path)
    config = read_config(path)
    update = update_after(path, config, stage) if stage else update
    wanted, notes = particles or tuple(range(config.num_particles)), []
    if update is None:
        found, notes = newest_valid(path / "checkpoints", config, SHOWN)
        if found is None:
            reason = "; ".join(notes) or "none was saved yet"
            raise ValueError(f"{path} has no valid checkpoint ({reason}): let the run go on, or resume it")
    check_particles(path, config, wanted)
    if update is not None:
        found = with_particles(path / "checkpoints", update, config, wanted)
    config = stage_of_checkpoint(stages_of(config), found.update).config
    thetas = {particle: read_particle(config, particle, found, device).eval() for particle in wanted}
    if decode is None and config.representation_row.is_latent:
        decode = load_prior(config.prior, device).decode
    return SavedRun(path, config, found.update, thetas, notes, decode)
