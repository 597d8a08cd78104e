"""How the last attempt at a run of a sweep ended, kept by who watched it: a run that was killed or refused leaves no word itself.

They stand in sweeps/<name>/attempts/<run id>.json; without that file there was none, one is under way, or its watcher was killed too.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from dist_vsd.runs.outcome import OUTCOME_FILE, read_outcome
from dist_vsd.sweep.manifest import PlannedRun, Sweep

DONE, STOPPED = 0, 75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt at a run, from start to end.

    Attributes:
        exit_code: the run's own where it told one, else its process's (128 + the signal's number if one ended it).
        error: one line; empty unless failed.
        started: seconds since 1970.
        ended: seconds since 1970.
        host: where.
        job: Slurm's id of the job or array task; empty outside one.
    """

    exit_code: int
    error: str = ""
    started: float = 0.0
    ended: float = 0.0
    host: str = ""
    job: str = ""


def attempt_file(sweep: Sweep, run_id: str) -> Path:
    """Return where the last attempt at a run is kept."""
    return sweep.path / "attempts" / f"{run_id}.json"


def write_attempt(file: Path, attempt: Attempt) -> None:
    """Keep an attempt that has ended, whole or not at all."""
    write_json(file, dataclasses.asdict(attempt))


def last_word(sweep: Sweep, run: PlannedRun) -> Attempt | None:
    """Return how a run ended last, by its own word or its watcher's, whichever is newer; None without either."""
    run_dir, file = sweep.run_dir(run), attempt_file(sweep, run.id)
    outcome, attempt = read_outcome(run_dir), _read(file)
    if outcome is None or (attempt is not None and _written(file) >= _written(run_dir / OUTCOME_FILE)):
        return attempt
    return Attempt(exit_code=outcome.exit_code, error=outcome.error)


def _read(file: Path) -> Attempt | None:
    try:
        return Attempt(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _written(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def write_json(file: Path, content: Any) -> None:
    """Write JSON whole or not at all, making the folder if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(file)
