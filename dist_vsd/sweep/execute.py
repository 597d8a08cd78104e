"""One run of a sweep, from lease to outcome: what an array task does, and what `submit --local` starts.

The ranks are told to stop directly, past their launcher, which would give them 30 seconds and then kill them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from dist_vsd.errors import RunFailed
from dist_vsd.runs import lease as leases
from dist_vsd.runs.outcome import FREE_WITHIN_SECONDS, OUTCOME_FILE, read_outcome, wait_until_free
from dist_vsd.sweep.attempts import DONE, STOPPED, Attempt, attempt_file, last_word, write_attempt
from dist_vsd.sweep.child_process import PassedOn, StopSignals, ranks_of, start
from dist_vsd.sweep.launch import launch_command, write_run_config
from dist_vsd.sweep.manifest import PlannedRun, Sweep
from dist_vsd.sweep.submissions import SLURM, Submission, read_submission

POLL_SECONDS = 0.2


def execute(sweep: Sweep, run: PlannedRun, submission: Submission | None = None) -> int:
    """Run or go on with a run, if it is not done and nobody else does.

    Args:
        sweep: that the run is of.
        run: which.
        submission: that this process is a task of, if any; a Slurm task whose run stopped early goes back into the queue.

    Returns:
        The exit code of the run: 0 (also if it was done or is someone else's), 1, 2, 75, or 128 + a signal.

    Raises:
        RunFailed: a process that has no lease holds the run's directory.
    """
    stop = StopSignals().install()
    if _is_done(sweep, run):
        return DONE
    try:
        lease = _take(sweep, run, stop)
    except StoppedWaiting:
        return _requeued(sweep, run, submission, STOPPED)
    if lease is None:
        return STOPPED if stop.received else DONE
    with lease:
        if _is_done(sweep, run):  # by who had the lease a moment ago
            return DONE
        code = _attempt(sweep, run, lease, stop)
        if lease.is_lost:
            print(f"{run.id}: another process has taken this run over; stopped", flush=True)
            return STOPPED
    return _requeued(sweep, run, submission, code)


def _requeued(sweep: Sweep, run: PlannedRun, submission: Submission | None, code: int) -> int:
    """Put a Slurm task whose run stopped early back into the queue; return the exit code of the run."""
    if code == STOPPED and submission is not None and submission.kind == SLURM and not read_submission(submission.file).cancelled:
        from dist_vsd.sweep.requeue import requeue_if_progress

        return requeue_if_progress(sweep.run_dir(run), code)
    return code


class StoppedWaiting(Exception):
    """This process was told to stop while it waited for the dead lease of its own task's earlier life."""


def _is_done(sweep: Sweep, run: PlannedRun) -> bool:
    word = last_word(sweep, run)
    if word is None or word.exit_code != DONE:
        return False
    print(f"{run.id}: done already", flush=True)
    return True


def _take(sweep: Sweep, run: PlannedRun, stop: StopSignals) -> leases.Lease | None:
    """Take the run's lease; None, and a line, if someone else has it, or if this process shall stop.

    An earlier life of this very Slurm task, ended with its node, is waited for until its lease is dead: nobody else would come.

    Raises:
        StoppedWaiting: told to stop in that wait; the run is still nobody else's.
    """
    folder, deadline = sweep.path / "leases", time.monotonic() + leases.DEAD_AFTER_SECONDS + leases.BEAT_SECONDS
    while True:
        lease = leases.acquire(folder, run.id)
        if lease is not None:
            return lease
        held = leases.find(folder, run.id)
        owner = held.owner if held else None
        is_own = owner is not None and owner.job != "" and owner.job == os.environ.get("SLURM_JOB_ID")
        if is_own and stop.received:
            print(f"{run.id}: stopped while it waited for the end of {owner}, its task's earlier life", flush=True)
            raise StoppedWaiting
        if not is_own or time.monotonic() > deadline:
            print(f"{run.id}: being run by {owner or 'another process'}; nothing to do", flush=True)
            return None
        time.sleep(1.0)


def _attempt(sweep: Sweep, run: PlannedRun, lease: leases.Lease, stop: StopSignals) -> int:
    """Start the run, pass signals on, wait for its end and keep how it ended."""
    run_dir, file = sweep.run_dir(run), attempt_file(sweep, run.id)
    is_free = wait_until_free(run_dir, FREE_WITHIN_SECONDS, lambda: bool(stop.received))  # of ranks of an earlier owner
    if stop.received:
        return STOPPED
    if not is_free:
        raise RunFailed(f"run directory {run_dir} is in use by a process outside the sweep: stop it, or wait for it")
    owner, config = leases.Owner.this_process(), write_run_config(sweep, run)
    file.unlink(missing_ok=True)
    before = _identity(run_dir / OUTCOME_FILE)
    log = sweep.path / "logs" / f"{run.id}.log"
    log.parent.mkdir(exist_ok=True)
    print(f"{run.id}: started; its output is in {log}", flush=True)
    with open(log, "ab") as stream:
        stream.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}, {owner}\n".encode())
        stream.flush()
        begin = stream.tell()
        has_launcher = sweep.settings.num_processes > 1
        child = start(launch_command(sweep, run, config), stream, os.environ | {"PYTHONUNBUFFERED": "1"}, ignores_usr1=has_launcher)
        child_code = _watch(child, has_launcher, lease, stop)
    wait_until_free(run_dir, FREE_WITHIN_SECONDS)  # ranks whose launcher was killed save, and tell their outcome
    outcome = read_outcome(run_dir) if _identity(run_dir / OUTCOME_FILE) != before else None
    code = outcome.exit_code if outcome else _code_without_outcome(child_code, bool(stop.received))
    if lease.is_lost:
        return code
    error = "" if code in (DONE, STOPPED) else (outcome.error if outcome else "") or _last_error(log, begin, child_code)
    write_attempt(file, Attempt(exit_code=code, error=error, started=owner.since, ended=time.time(), host=owner.host, job=owner.job))
    print(f"{run.id}: " + ({DONE: "done", STOPPED: "stopped early, saved"}.get(code) or f"failed with {code}: {error}"), flush=True)
    return code


def _watch(child: subprocess.Popen, has_launcher: bool, lease: leases.Lease, stop: StopSignals) -> int:
    """Wait for a run to end, passing on to its ranks each signal that comes, and SIGTERM if the lease is lost."""
    passed_on = PassedOn()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(POLL_SECONDS)
        signals = stop.received or ([signal.SIGTERM] if lease.is_lost else [])
        if signals:
            passed_on.send(signals, ranks_of(child.pid) if has_launcher else [child.pid])


def _code_without_outcome(child_code: int, was_stopped: bool) -> int:
    """Return the exit code of a run that left no word: it was refused, killed, or stopped before it had begun."""
    if was_stopped and child_code != 2:
        return STOPPED
    return child_code if child_code >= 0 else 128 - child_code


def _last_error(log: Path, begin: int, child_code: int) -> str:
    """Return the line of an attempt's output that says best why it failed."""
    with open(log, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(begin, size - 65536))
        lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
    told = [line.split(": ", 2)[2] for line in lines if line.startswith(("dist-vsd: error: ", "dist-vsd: failed: "))]
    by_signal = f"ended by {signal.Signals(-child_code).name}; " if child_code < 0 else ""
    return (by_signal + (told or lines or ["no output"])[-1])[:500]


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns
