"""Folders of a benchmark that are there whole or not at all, and which particle each is of; what was begun goes on where it stopped.

    OUT/<name>                     complete: written beside and renamed into place
    OUT/.dist_vsd/<name>/          under way: pictures, each written beside and renamed
    OUT/.dist_vsd/<name>.json      of which particle it is, as it was at which update

Nothing of ours lies inside of a folder, as T3Bench opens every file of one as a picture; GPTEval3D passes over names that begin with a dot.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_vsd.image_files import write_png
from dist_vsd.particles.particle import Particle

BESIDE = ".dist_vsd"


def digest_of(theta: Particle) -> str:
    """Return a hash of all that a particle holds, by which it is known again."""
    digest = hashlib.sha256()
    for name, tensor in sorted(theta.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of a benchmark.

    Attributes:
        root: of all that is written.
        name: of the folder within it.
        record: of what it holds, as plain values; ``owner`` names the particle, the rest what must not have changed.
    """

    root: Path
    name: str
    record: dict[str, Any]

    @property
    def path(self) -> Path:
        """Where it is once it is complete."""
        return self.root / self.name

    @property
    def beside(self) -> Path:
        """Where it is written."""
        return self.root / BESIDE / self.name

    def is_complete(self) -> bool:
        """Say whether it is there, whole, and of the particle as it is now."""
        return self.path.is_dir() and not self.beside.exists() and saved_record(self.root, self.name) == self.record

    def begin(self) -> None:
        """Make the folder to write in; of what was begun before only what is of the same particle, as it is now, stays."""
        if self.beside.exists() and saved_record(self.root, self.name) != self.record:
            shutil.rmtree(self.beside)
        self.beside.mkdir(parents=True, exist_ok=True)
        _replace(_sidecar(self.root, self.name), json.dumps(self.record, indent=1) + "\n")

    def finish(self) -> None:
        """Put what was written into its place."""
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.beside.rename(self.path)


def saved_record(root: Path, name: str) -> dict[str, Any] | None:
    """Return what is known of a folder, or None."""
    try:
        return json.loads(_sidecar(root, name).read_text())
    except (OSError, ValueError):
        return None


def slots_of(root: Path, name_of: Callable[[int], str], owners: Sequence[str]) -> dict[str, int]:
    """Deal the numbered folders of a prompt to particles: those that have one keep it, the others get the lowest that are free.

    Args:
        root: of all that is written.
        name_of: gives the name of a folder by its number.
        owners: names of the particles.

    Raises:
        ValueError: a folder that would be written is not ours.
    """
    taken: dict[str, int] = {}
    for number in itertools.count():
        name = name_of(number)
        record = saved_record(root, name)
        if record is None and (root / name).exists():
            raise ValueError(f"{root / name} is there and was not written by this command: choose another --out or --method")
        if record is None:
            break
        taken[record["owner"]] = number
    free = itertools.count(number)
    return {owner: taken[owner] if owner in taken else next(free) for owner in owners}


def write_pictures(
    folder: Folder, groups: Sequence[Sequence[str]], render: Callable[[int], Sequence[Tensor]], tell: Callable[[], None]
) -> None:
    """Write the pictures of a folder that are not there yet, and put it into its place.

    Args:
        folder: to write.
        groups: names of the files that one render gives, for each render.
        render: gives the pictures of a render by its number, (1, 3, H, W) in [0, 1] each.
        tell: called after each render, or what stands for one.
    """
    folder.begin()
    for number, names in enumerate(groups):
        if not all((folder.beside / name).exists() for name in names):
            for name, picture in zip(names, render(number), strict=True):
                temporary = folder.beside / f"{name}.tmp"
                write_png(picture, temporary)
                temporary.replace(folder.beside / name)
        tell()
    folder.finish()


def _sidecar(root: Path, name: str) -> Path:
    return root / BESIDE / f"{name}.json"


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
