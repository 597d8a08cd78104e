"""Submissions: which runs were handed out together, and to whom.

sweeps/<name>/submissions/0001.json holds the kind, Slurm's job id, and the runs' ids; a task of an array is a position in that list.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from dist_vsd.sweep.attempts import write_json
from dist_vsd.sweep.manifest import PlannedRun, Sweep

VERSION = 1
SLURM, LOCAL = "slurm", "local"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Submission:
    """Runs that were handed out together.

    Attributes:
        file: where this is kept.
        kind: "slurm" (an array job) or "local" (a process that starts them in turn).
        runs: ids, in order.
        job: Slurm's id of the array job; empty for local ones, and until sbatch has answered.
        cancelled: no task may go back into the queue.
    """

    file: Path
    kind: str
    runs: tuple[str, ...]
    job: str = ""
    cancelled: bool = False

    @property
    def lease(self) -> str:
        """The name of the lease that a local submitter holds while it lives; no run's id has an underscore."""
        return f"submission_{self.file.stem}"


def next_file(sweep: Sweep) -> Path:
    """Return the file of the next submission; for the holder of the sweep's submitting lease."""
    numbers = [int(file.stem) for file in (sweep.path / "submissions").glob("*.json") if file.stem.isdigit()]
    return sweep.path / "submissions" / f"{max(numbers, default=0) + 1:04d}.json"


def write_submission(submission: Submission) -> None:
    """Write a submission, whole or not at all."""
    values = {"version": VERSION, **dataclasses.asdict(submission)}
    del values["file"]
    write_json(submission.file, values)


def read_submission(file: Path) -> Submission:
    """Read a submission; ValueError if there is none or it is of another version."""
    try:
        values = json.loads(file.read_text())
        if values.pop("version") != VERSION:
            raise ValueError("another version")
        return Submission(file=file, **values | {"runs": tuple(values["runs"])})
    except FileNotFoundError as error:
        raise ValueError(f"submission {file} does not exist: see {file.parent}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"submission {file} can't be read ({type(error).__name__}): submit the sweep again") from error


def read_submissions(sweep: Sweep) -> list[Submission]:
    """Return all submissions, oldest first."""
    files = sorted(file for file in (sweep.path / "submissions").glob("*.json") if file.stem.isdigit())
    return [read_submission(file) for file in files]


def find_run(sweep: Sweep, run_id: str) -> PlannedRun:
    """Return a run of a sweep by its id; ValueError for an unknown one."""
    for run in sweep.runs:
        if run.id == run_id:
            return run
    raise ValueError(f"run {run_id[:80]!r} is not in {sweep.path}: see `dist-vsd sweep status --json` for the ids")
