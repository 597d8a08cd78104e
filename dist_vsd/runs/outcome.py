"""How a run ended and how far it is, read from its directory without anything heavy: what sweeps and Slurm scripts look at."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

CONFIG_FILE, LOCK_FILE, OUTCOME_FILE, REQUEUES_FILE = "config.yaml", ".lock", "outcome.json", "requeues.json"

FREE_WITHIN_SECONDS = 60.0  # for ranks whose launcher is gone and that are still saving


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the last process group that worked on a run ended; launchers lose the ranks' exit code, so it is kept in a file.

    Attributes:
        exit_code: 0 done, 75 stopped early with everything saved, 1 failed.
        update: updates done and saved.
        error: one line; empty unless failed.
        attempt: of a Slurm job that ended so; empty outside one.
    """

    exit_code: int
    update: int
    error: str = ""
    attempt: str = ""


def slurm_attempt() -> str:
    """Return the present Slurm job and how often it was requeued, as "job.restarts"; empty outside a job."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""


def read_outcome(run_dir: Path) -> Outcome | None:
    """Return how the run ended last; None while it is under way, if it was killed, or if it never began."""
    try:
        return Outcome(**json.loads((run_dir / OUTCOME_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_outcome(run_dir: Path, outcome: Outcome) -> None:
    """Write how the run ended, whole or not at all; a full disk is passed over, for it has its own message."""
    temporary = run_dir / f".{OUTCOME_FILE}.{os.getpid()}"  # after a loss several ranks may write it
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(dataclasses.asdict(outcome)) + "\n")
        temporary.replace(run_dir / OUTCOME_FILE)


def wait_until_free(run_dir: Path, seconds: float, is_stopped: Callable[[], bool] = lambda: False) -> bool:
    """Wait for the ranks that work in a run's directory, which may outlive their launcher for a while, to save and let go.

    Args:
        run_dir: of the run; need not exist.
        seconds: to wait for at most.
        is_stopped: ends the wait early.

    Returns:
        Whether nobody works there now.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            with open(run_dir / LOCK_FILE) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except FileNotFoundError:
            return True
        except BlockingIOError:
            if is_stopped() or time.monotonic() > deadline:
                return False
            time.sleep(0.2)


def newest_update(run_dir: Path) -> int:
    """Return the number of updates of the newest checkpoint by name (it may be damaged); 0 without one."""
    try:
        names = os.listdir(run_dir / "checkpoints")
    except OSError:
        return 0
    return max((int(name[7:]) for name in names if name.startswith("update_") and name[7:].isdigit()), default=0)
