"""Stopping a sweep: what runs saves and stops, what waits is taken out of its queue."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket

from dist_vsd.errors import RunFailed
from dist_vsd.runs import lease as leases
from dist_vsd.sweep import slurm
from dist_vsd.sweep.manifest import Sweep
from dist_vsd.sweep.submissions import SLURM, Submission, read_submissions, write_submission


def cancel(sweep: Sweep) -> list[str]:
    """Cancel all submissions, and runs that were started by hand on this machine.

    Args:
        sweep: whose.

    Returns:
        What was done, a line each; none if nothing was queued or running.

    Raises:
        RunFailed: Slurm does not answer.
    """
    return _cancel_arrays(sweep) + _cancel_local(sweep)


def _cancel_arrays(sweep: Sweep) -> list[str]:
    arrays = {s.job: s for s in read_submissions(sweep) if s.kind == SLURM and s.job and not s.cancelled}
    if not arrays:
        return []
    if shutil.which("scancel") is None:
        raise RunFailed(f"array job(s) {', '.join(arrays)} can't be cancelled here: scancel is not on this machine")
    queued = {job for job, _ in slurm.queued_tasks(list(arrays))}
    told = []
    for job, submission in arrays.items():
        _mark_cancelled(submission)  # first: a task that saves and stops asks for this before it would requeue itself
        if job in queued:
            slurm.cancel(job)
            told.append(f"array job {job}: waiting tasks are cancelled, running ones save and stop (scancel {job} ends them at once)")
    return told


def _mark_cancelled(submission: Submission) -> None:
    write_submission(dataclasses.replace(submission, cancelled=True))


def _cancel_local(sweep: Sweep) -> list[str]:
    """Send SIGTERM to the owners of living leases outside Slurm: a local submitter passes it on to its runs."""
    told = []
    for name, lease in leases.alive(sweep.path / "leases").items():
        owner, is_submitter = lease.owner, name.startswith("submission_")
        if owner is None or name == "submit" or (owner.job and not is_submitter):
            continue
        what = "local submission" if is_submitter else f"run {name}"
        if not owner.is_alive_here:
            told.append(f"{what}: can't be stopped from {socket.gethostname()}; cancel on {owner.host}")
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(owner.pid, signal.SIGTERM)
        told.append(f"{what}: process {owner.pid} saves and stops")
    return told
