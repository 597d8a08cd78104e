"""Checkpoints: written beside and renamed into place, hashed, safetensors and JSON only, the newest valid one wins.

    checkpoints/update_00000500/  manifest.json  phi.safetensors  phi_optimizer.safetensors  particles/0000.safetensors

No state of a random generator is saved: every draw is keyed by its update, so a resumed run draws what it would have drawn.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_vsd.config import RunConfig
from dist_vsd.config_files import config_fingerprint
from dist_vsd.errors import RunFailed
from dist_vsd.particles.owned_particle import OwnedParticle, load_theta
from dist_vsd.particles.particle import Particle
from dist_vsd.serialization import read_tensors, write_tensors
from dist_vsd.training.stages import stages_of
from dist_vsd.training.state import TrainingState, build_particle

FORMAT_VERSION = 3  # 2: with the fingerprint of the configuration; 3: draws keyed by all bits of their keys
READERS = {1: "0.1", 2: "0.2 to 0.4"}  # versions of dist_vsd that go on from older formats
SHOWN = (2, FORMAT_VERSION)  # formats whose particles can be looked at
MANIFEST = "manifest.json"
_NAME = re.compile(r"update_(\d{8})")


class CheckpointError(RunFailed):
    """A checkpoint could not be written; older ones are untouched."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found to be whole.

    Attributes:
        path: its folder.
        update: updates done.
    """

    path: Path
    update: int

    def particle_file(self, particle: int) -> Path:
        """Return the file of one particle."""
        return self.path / "particles" / f"{particle:04d}.safetensors"


def save(state: TrainingState, folder: Path, update: int) -> Path:
    """Save the state after ``update`` updates (collective) and remove the oldest checkpoints.

    Args:
        state: of the run; every particle is written by one rank, phi by rank 0.
        folder: of the run's checkpoints.
        update: updates done.

    Raises:
        CheckpointError: on every rank if any could not write (a full disk); nothing that was finished is touched.
    """
    final = folder / f"update_{update:08d}"
    partial = folder / f".partial_{update:08d}"
    is_first = state.layout.rank == 0
    if is_first:
        _remove_unfinished(folder)
        partial_made = _attempt(lambda: (partial / "particles").mkdir(parents=True))
    # Under ZeRO every rank holds a part of these: all must ask for them.
    phi = state.phi.tensors() if state.phi is not None else {}
    moments = state.phi.moments() if state.phi is not None else {}
    state.collectives.barrier()
    error = partial_made if is_first else None
    hashes: dict[str, str] = {}
    if error is None:
        error = _attempt(lambda: _write_files(state, partial, phi, moments, hashes))
    reports = state.collectives.gather_json({"error": error, "hashes": hashes})
    errors = [f"rank {rank}: {r['error']}" for rank, r in enumerate(reports) if r["error"]]
    if not errors and is_first:
        manifest = {
            "version": FORMAT_VERSION,
            "stage": state.stage.name,
            "update": update,
            "config_sha256": config_fingerprint(state.stage.run),
            "world_size": state.layout.world_size,
            "num_particles": state.layout.num_particles,
            "sha256": {name: digest for report in reports for name, digest in report["hashes"].items()},
        }
        error = _attempt(lambda: _finish(partial, final, manifest))
        errors = [f"rank 0: {error}"] if error else []
        _remove_old(folder, state.config.keep_checkpoints, {f"update_{stage.last:08d}" for stage in stages_of(state.stage.run)})
    errors = state.collectives.gather_json(errors)[0] or errors
    if errors:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"checkpoint of update {update} could not be written ({'; '.join(errors)}): free space and use --resume")
    return final


def _attempt(action: Any) -> str | None:
    try:
        action()
    except OSError as error:
        return str(error)
    return None


def _write_files(
    state: TrainingState, folder: Path, phi: dict[str, Tensor], moments: dict[str, Tensor], hashes: dict[str, str]
) -> None:
    for particle in state.particles:
        if state.layout.owner(particle.id) == state.layout.rank:
            _write(particle.tensors(), folder, f"particles/{particle.id:04d}.safetensors", hashes)
    if state.layout.rank == 0 and state.phi is not None:
        _write(phi, folder, "phi.safetensors", hashes)
        _write(moments, folder, "phi_optimizer.safetensors", hashes)


def _write(tensors: dict[str, Tensor], folder: Path, name: str, hashes: dict[str, str]) -> None:
    write_tensors(tensors, folder / name)
    hashes[name] = _sha256(folder / name)


def _finish(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    with open(partial / MANIFEST, "w") as opened:
        opened.write(json.dumps(manifest, indent=1) + "\n")
        opened.flush()
        os.fsync(opened.fileno())
    replaced = partial.with_name(f".replaced_{final.name}")
    if final.exists():  # a damaged one that was passed over: it goes only once the new one stands in its place
        final.rename(replaced)
    partial.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renaming itself survives a power cut
    finally:
        os.close(folder)


def _remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in [*folder.glob(".partial_*"), *folder.glob(".replaced_*")]:
        shutil.rmtree(path, ignore_errors=True)


def _remove_old(folder: Path, keep: int, kept: set[str]) -> None:
    """Remove all but the newest checkpoints, and those with which stages ended: from there they are gone on with, or done again."""
    for path in sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name))[:-keep]:
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


def newest_valid(folder: Path, config: RunConfig, formats: tuple[int, ...] = (FORMAT_VERSION,)) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest whole checkpoint.

    Args:
        folder: of the run's checkpoints.
        config: of the run that they must belong to.
        formats: that are accepted; SHOWN to look at particles alone, since older runs can't go on with this version's draws.

    Returns:
        The checkpoint, or None; and for every newer one that was passed over a line that says why.
    """
    passed_over: list[str] = []
    names = sorted((p for p in folder.glob("update_*") if _NAME.fullmatch(p.name)), reverse=True)
    for path in names:
        fault = _fault(path, config, formats)
        if fault is None:
            return Checkpoint(path, int(path.name.removeprefix("update_"))), passed_over
        passed_over.append(f"checkpoint {path.name} is passed over: {fault}")
    return None, passed_over


def left_after(folder: Path, update: int, config: RunConfig) -> Checkpoint:
    """Return the checkpoint after an update, such as the one that a stage has left.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = folder / f"update_{update:08d}"
    if fault := _fault(path, config, (FORMAT_VERSION,)):
        raise ValueError(f"the stage begins from {path}, which can't be used ({fault}): restore it, or start the run anew")
    return Checkpoint(path, update)


def updates_in(folder: Path) -> list[int]:
    """Return the updates of the checkpoints in a folder, by their names alone, from old to new."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:  # there is none yet
        return []
    return sorted(int(name.removeprefix("update_")) for name in names if _NAME.fullmatch(name))


def with_particles(folder: Path, update: int, config: RunConfig, particles: tuple[int, ...]) -> Checkpoint:
    """Return the checkpoint of an update, of which nothing but these particles is read and checked.

    Args:
        folder: of the run's checkpoints.
        update: updates done.
        config: of the run that it must belong to.
        particles: ids.

    Raises:
        ValueError: it is missing, or these particles are damaged.
    """
    path = folder / f"update_{update:08d}"
    files = frozenset(f"particles/{particle:04d}.safetensors" for particle in particles)
    if fault := _fault(path, config, SHOWN, files):
        raise ValueError(f"checkpoint {path.name} can't be shown ({fault}): choose another update")
    return Checkpoint(path, update)


def _fault(path: Path, config: RunConfig, formats: tuple[int, ...], files: frozenset[str] | None = None) -> str | None:
    """Say what is wrong with a checkpoint, or None; of its files those named alone are looked into, if any are."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        version = manifest["version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{MANIFEST} is missing or unreadable"
    if not isinstance(version, int) or version not in formats:
        reader = f", which dist_vsd {READERS[version]} reads" if isinstance(version, int) and version in READERS else ""
        return f"it has format version {str(version)[:20]}{reader}; this program goes on from {FORMAT_VERSION}"
    try:
        hashes, update, saved_fingerprint = dict(manifest["sha256"]), int(manifest["update"]), manifest["config_sha256"]
        num_particles = int(manifest["num_particles"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return f"{MANIFEST} is missing or unreadable"
    if f"update_{update:08d}" != path.name:
        return f"its manifest is of update {update}"
    is_another = version == FORMAT_VERSION and saved_fingerprint != config_fingerprint(config)  # an older version's is of its own defaults
    if is_another or num_particles != config.num_particles:
        return "it is from a run with another configuration"
    absent = next((name for i in range(config.num_particles) if (name := f"particles/{i:04d}.safetensors") not in hashes), None)
    if absent:
        return f"its manifest does not name {absent}"
    for name, digest in hashes.items():
        if files is not None and name not in files:
            continue
        try:
            file = (path / name).resolve()
        except (ValueError, OSError):  # a null byte, or a name that is too long
            return f"its manifest names {name[:40]!r}, which is no file's name"
        if not file.is_relative_to(path.resolve()):
            return f"its manifest names {name}, outside of it"
        if not file.is_file():
            return f"{name} is missing"
        try:
            actual = _sha256(file)
        except OSError as error:
            return f"{name} can't be read ({error.strerror})"
        if actual != digest:
            return f"{name} is damaged (its sha256 differs)"
    return None


def restore(state: TrainingState, checkpoint: Checkpoint) -> None:
    """Put a whole checkpoint back into a state: this rank's particles, by their ids, and phi (collective under ZeRO)."""
    for particle in state.particles:
        restore_particle(state, particle, checkpoint)
    restore_phi(state, checkpoint)


def restore_phi(state: TrainingState, checkpoint: Checkpoint) -> None:
    """Put phi back as a checkpoint has it, where there is one (collective under ZeRO)."""
    if state.phi is not None:
        moments = read_tensors(checkpoint.path / "phi_optimizer.safetensors")
        state.phi.load(read_tensors(checkpoint.path / "phi.safetensors"), moments)


def restore_particle(state: TrainingState, particle: OwnedParticle, checkpoint: Checkpoint) -> None:
    """Put one particle back as a checkpoint of its stage has it."""
    put_back(state, particle, read_tensors(checkpoint.particle_file(particle.id)))


def put_back(state: TrainingState, particle: OwnedParticle, tensors: dict[str, Tensor]) -> None:
    """Put what OwnedParticle.tensors returned into a particle, wherever it is kept."""
    state.placement.fetch([particle])
    particle.restore(tensors)
    state.placement.release([particle])
    state.placement.settle()


def read_particle(config: RunConfig, particle: int, checkpoint: Checkpoint, device: torch.device | str = "cpu") -> Particle:
    """Return a particle as a checkpoint has it.

    Args:
        config: of the stage that saved it.
        particle: its id.
        checkpoint: that was found to be whole.
        device: to put it on.
    """
    theta = build_particle(config, particle, torch.device(device)).theta
    load_theta(theta, read_tensors(checkpoint.particle_file(particle)))
    return theta


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
