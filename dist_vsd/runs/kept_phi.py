"""A phi that goes on in a later stage: where the particles come from, the last stage that trained one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dist_vsd.runs.checkpoint import left_after, newest_valid, restore_phi
from dist_vsd.runs.run_directory import split_stage
from dist_vsd.runs.saved_run import read_config, update_after
from dist_vsd.training.stages import Stage, stage_of_checkpoint, stages_of
from dist_vsd.training.state import TrainingState

SHARED = ("rank", "targets", "alpha", "prior", "camera")  # what two phis must share, of their ScoreConfig


@dataclasses.dataclass(frozen=True)
class LeftPhi:
    """A phi that a stage has left.

    Attributes:
        stage: that trained it.
        checkpoints: folder of its run's.
        update: of its run, after which it is taken.
    """

    stage: Stage
    checkpoints: Path
    update: int


def find_kept_phi(stage: Stage, checkpoints: Path) -> LeftPhi | None:
    """Find the phi that goes on in a stage; None where its own is new.

    Args:
        stage: of a run.
        checkpoints: folder of that run's.

    Raises:
        ValueError: the run that the particles come from has none, or its layers are others.
    """
    if not stage.phi_goes_on:
        return None
    remedy, found = f"--stage {stage.name}.score.keep=false", _left_before(stage, checkpoints)
    if found is None:
        raise ValueError(f"score.keep: what stage {stage.name} begins from has trained no phi that could go on: say {remedy}")
    for name in SHARED:
        own, theirs = (getattr(one.config.score, name) for one in (stage, found.stage))
        if own != theirs:
            differs = f"stage {stage.name} has score.{name} {own}, {found.stage.name} {theirs}"
            raise ValueError(f"score.keep: {differs}: give both the same, or say {remedy}")
    return found


def put_kept_phi(state: TrainingState, checkpoints: Path) -> str:
    """Put phi to where it goes on, if it does (collective under ZeRO); return the line that says so, or nothing."""
    found = find_kept_phi(state.stage, checkpoints)
    if found is None:
        return ""
    restore_phi(state, left_after(found.checkpoints, found.update, found.stage.run))
    return f"phi goes on from where stage {found.stage.name} has left it after update {found.update}"


def _left_before(stage: Stage, checkpoints: Path) -> LeftPhi | None:
    """Go back through the stages, and the runs, from which the particles of a stage come."""
    if stage.config.start_from:
        return _left_by_run(stage.config.start_from)
    before = [other for other in stages_of(stage.run) if other.first < stage.first]
    if not before:
        return None
    if before[-1].config.objective_row.needs_phi:
        return LeftPhi(before[-1], checkpoints, before[-1].last)
    return _left_before(before[-1], checkpoints)


def _left_by_run(name: str) -> LeftPhi | None:
    """Return the last phi of another run, by its name as --start-from takes it."""
    path, stage_name = split_stage(Path(name))
    config = read_config(path)
    if stage_name:
        update = update_after(path, config, stage_name)
    else:  # the checkpoint that the particles come from, too
        found, _ = newest_valid(path / "checkpoints", config)
        update = found.update if found else 0
    stage = stage_of_checkpoint(stages_of(config), update)
    if stage.config.objective_row.needs_phi:
        return LeftPhi(stage, path / "checkpoints", update)
    return _left_before(stage, path / "checkpoints")
