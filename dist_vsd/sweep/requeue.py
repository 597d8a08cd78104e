"""Putting a Slurm job back into the queue after its run stopped early. Slurm itself does not, when a job ran out of time."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from dist_vsd.runs.outcome import (
    FREE_WITHIN_SECONDS,
    REQUEUES_FILE,
    newest_update,
    read_outcome,
    slurm_attempt,
    wait_until_free,
)

STOPPED = 75
STARTS_WITHOUT_PROGRESS = 3


def requeue_if_progress(run_dir: Path, exit_code: int) -> int:
    """Requeue the present Slurm job if its run stopped early with everything saved, and say so.

    A run that failed, was refused or is done is not requeued, nor one that made no progress in three starts.

    Args:
        run_dir: of the run.
        exit_code: of the launcher; the run's own, from outcome.json, counts where this job wrote one.

    Returns:
        The exit code of the run: 0, 1, 2 or 75.
    """
    wait_until_free(run_dir, FREE_WITHIN_SECONDS)  # the end of this script ends ranks that are still saving
    outcome, attempt = read_outcome(run_dir), slurm_attempt()
    if outcome is not None and outcome.attempt == attempt:
        exit_code = outcome.exit_code
    elif exit_code not in (0, STOPPED):
        print(f"dist-vsd: the run ended with {exit_code} and left no word of its own: not requeued", flush=True)
    if exit_code != STOPPED or not attempt:
        return exit_code
    update = newest_update(run_dir)
    updates = _history(run_dir / REQUEUES_FILE, update)
    if len(set(updates[-STARTS_WITHOUT_PROGRESS - 1 :])) == 1 and len(updates) > STARTS_WITHOUT_PROGRESS:
        print(
            f"dist-vsd: no progress in {STARTS_WITHOUT_PROGRESS} starts (update {update} each time): not requeued; "
            "give the job a longer time limit",
            flush=True,
        )
        return STOPPED
    print(f"dist-vsd: stopped at update {update}, everything is saved: the job goes back into the queue", flush=True)
    done = subprocess.run(["scontrol", "requeue", _job()], capture_output=True, text=True)
    if done.returncode:
        print(f"dist-vsd: scontrol requeue failed ({' '.join(done.stderr.split())}): submit the job again to go on", flush=True)
    return STOPPED


def _job() -> str:
    """Return the present job as scontrol names it. The last task of an array has the array's own id for SLURM_JOB_ID: all tasks."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def _history(file: Path, update: int) -> list[int]:
    """Add an update to the file of those at which the run stopped; return them all, after the 0 that it began with."""
    try:
        updates = [int(u) for u in json.loads(file.read_text())]
    except (OSError, ValueError, TypeError):
        updates = [0]
    updates.append(update)
    file.parent.mkdir(parents=True, exist_ok=True)  # a run may be stopped before it has made its directory
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(updates))
    temporary.replace(file)
    return updates
