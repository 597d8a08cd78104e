"""A sweep's directory: its settings, and a manifest of runs that only grows.

    sweeps/<name>/
      sweep.json           settings, and the version of this format
      manifest.jsonl       one line a run: id, prompt, seed, overrides, tags
      sweep.sbatch         the array's script, as it ships
      runs/<run id>/       run directories (training/run_directory.py)
      results/             what `collect` writes

A run's id is made of its content, so planning the same prompts again finds the runs that exist, and new prompts add new ones.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dist_vsd.writable import require_writable_folder

VERSION = 1
SETTINGS_FILE, MANIFEST_FILE = "sweep.json", "manifest.jsonl"
WRITTEN_BY_RUNS = ("runs", "leases", "submissions", "configs", "attempts", "logs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What all runs of a sweep share.

    Attributes:
        name: of the sweep; wandb's group.
        preset: that every run starts from.
        num_processes: ranks of one run, on one node.
        launch_config: accelerate's YAML for runs of more than one rank; empty: plain data parallel.
    """

    name: str
    preset: str = "embedded"
    num_processes: int = 1
    launch_config: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        prompt: any text; it never becomes a path, a shell word or markup.
        seed: of the run.
        overrides: of the run's configuration, by dotted name (``{"objective": "sds", "score.rank": 8}``).
        tags: the user's.
    """

    prompt: str
    seed: int = 0
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    tags: tuple[str, ...] = ()

    @functools.cached_property
    def id(self) -> str:
        """A safe, short name that is the same for the same content: words of the prompt, the seed, and a hash of all that counts."""
        content = json.dumps([self.prompt, self.seed, sorted(self.overrides.items())], ensure_ascii=True)
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower())[:32].strip("-") or "run"
        return f"{words}-s{self.seed}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A planned sweep, read from its directory.

    Attributes:
        path: of the directory.
        settings: shared by all runs.
        runs: in the order of the manifest.
    """

    path: Path
    settings: SweepSettings
    runs: list[PlannedRun]

    def run_dir(self, run: PlannedRun) -> Path:
        """Return the run directory of a run; it need not exist yet."""
        return self.path / "runs" / run.id


def read_sweep(path: Path) -> Sweep:
    """Read a sweep's directory.

    Raises:
        ValueError: there is no sweep, it is of another version, or a line of it can't be read.
    """
    return Sweep(path, read_settings(path), list(_read_manifest(path / MANIFEST_FILE)))


def require_writable_sweep(sweep: Sweep) -> None:
    """Refuse a sweep into whose directory this process can't write what running it takes; ValueError."""
    for name in WRITTEN_BY_RUNS:
        require_writable_folder(sweep.path / name, f"sweep directory {sweep.path / name}", "make way for it, or copy the sweep elsewhere")


def read_settings(path: Path) -> SweepSettings:
    """Read the settings of a sweep's directory.

    Raises:
        ValueError: there is no sweep, it is of another version, or its settings can't be read.
    """
    file = path / SETTINGS_FILE
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} holds no sweep ({SETTINGS_FILE} is missing): make one with `dist-vsd sweep plan`") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} can't be read ({type(error).__name__}): plan the sweep anew in another directory") from error
    version = content.pop("version", None) if isinstance(content, dict) else None
    if version != VERSION:
        raise ValueError(f"{file} is of version {version!r}, this dist_vsd reads {VERSION}: use the dist_vsd that planned it, or plan anew")
    try:
        return SweepSettings(**content)
    except TypeError as error:
        raise ValueError(f"{file} holds other settings than this version's ({error}): plan the sweep anew") from error


def _read_manifest(file: Path) -> Iterator[PlannedRun]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} can't be read ({type(error).__name__}): plan the sweep again into the same directory") from error
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            values = json.loads(line)
            run = PlannedRun(prompt=values["prompt"], seed=values["seed"], overrides=values["overrides"], tags=tuple(values["tags"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: not a run ({type(error).__name__}); take the line out") from error
        if run.id != values["id"]:
            raise ValueError(f"{file}, line {number}: the id {values['id']!r} is not its content's: plan changed prompts as new ones")
        yield run


def write_settings(path: Path, settings: SweepSettings) -> None:
    """Write a sweep's settings, whole or not at all."""
    _replace(path / SETTINGS_FILE, json.dumps({"version": VERSION, **dataclasses.asdict(settings)}, indent=1) + "\n")


def write_manifest(path: Path, runs: Iterable[PlannedRun]) -> None:
    """Write a manifest, whole or not at all."""
    lines = [json.dumps({"id": run.id, **dataclasses.asdict(run)}) + "\n" for run in runs]
    _replace(path / MANIFEST_FILE, "".join(lines))


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def nest(overrides: dict[str, Any]) -> dict[str, Any]:
    """Return values by dotted name as nested mappings, as configurations are written: {"score.rank": 8} is {"score": {"rank": 8}}."""
    root: dict[str, Any] = {}
    for name, value in overrides.items():
        *groups, last = name.split(".")
        inner = root
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return root
