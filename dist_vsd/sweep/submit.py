"""Handing out runs: which ones, and to whom; what is done, running or queued is not handed out again."""

from __future__ import annotations

import shlex
import shutil
import time
from collections import Counter
from collections.abc import Collection

from dist_vsd.runs import lease as leases
from dist_vsd.sweep import slurm
from dist_vsd.sweep.attempts import attempt_file
from dist_vsd.sweep.local import run_submission
from dist_vsd.sweep.manifest import Sweep
from dist_vsd.sweep.state import FAILED, STOPPED, WAITING, states_of
from dist_vsd.sweep.submissions import LOCAL, SLURM, Submission, next_file, read_submissions, write_submission

SUBMITTED = frozenset({WAITING, STOPPED})  # the states of runs that `submit` takes
RETRIED = frozenset({FAILED})
OTHERS_SUBMIT_WITHIN_SECONDS = 60.0


def submit_to_slurm(sweep: Sweep, wanted: Collection[str], options: slurm.SlurmOptions, dry_run: bool) -> None:
    """Submit runs as array jobs, as many as Slurm's limit on their size asks for, and say so.

    Args:
        sweep: that they are of.
        wanted: states of the runs to submit.
        options: of sbatch.
        dry_run: print the commands, write and submit nothing.

    Raises:
        ValueError: no Slurm here, or it refuses; nothing is submitted.
    """
    slurm.require(options)
    size = slurm.largest_array()
    if dry_run:
        picked = pick(sweep, wanted)
        _tell_picked(sweep, picked, wanted)
        first = int(next_file(sweep).stem)
        for number, runs in enumerate(_cut(picked, size), first):
            submission = Submission(file=sweep.path / "submissions" / f"{number:04d}.json", kind=SLURM, runs=runs)
            print(shlex.join(slurm.sbatch_command(sweep.path, submission, options, "JOB" if options.limit and number > first else "")))
        return
    (sweep.path / "logs").mkdir(exist_ok=True)
    slurm.copy_script(sweep.path)
    with _submitting(sweep):
        picked, previous = pick(sweep, wanted), ""
        _tell_picked(sweep, picked, wanted)
        for runs in _cut(picked, size):
            # A limit holds for all together, so one array follows the other.
            previous = _submit_array(sweep, runs, options, previous if options.limit else "")


def _submit_array(sweep: Sweep, runs: tuple[str, ...], options: slurm.SlurmOptions, after: str) -> str:
    """Submit one array and return its job id; the submission's file is there before a task can start."""
    submission = Submission(file=next_file(sweep), kind=SLURM, runs=runs)
    write_submission(submission)
    try:
        job = slurm.submit(slurm.sbatch_command(sweep.path, submission, options, after))
    except ValueError:
        submission.file.unlink()
        raise
    write_submission(Submission(file=submission.file, kind=SLURM, runs=runs, job=job))
    print(f"submitted {len(runs)} run(s) as array job {job}: {submission.file}")
    return job


def submit_locally(sweep: Sweep, wanted: Collection[str], jobs: int, dry_run: bool) -> int:
    """Run runs on this machine, ``jobs`` at a time, until all have ended.

    Args:
        sweep: that they are of.
        wanted: states of the runs.
        jobs: at the same time.
        dry_run: say which, and run nothing.

    Returns:
        The exit code: 0, 75 if stopped, 1 if a run failed.
    """
    if dry_run:
        picked = pick(sweep, wanted)
        _tell_picked(sweep, picked, wanted)
        print("\n".join(picked))
        return 0
    with _submitting(sweep):
        picked = pick(sweep, wanted)
        _tell_picked(sweep, picked, wanted)
        if not picked:
            return 0
        submission = Submission(file=next_file(sweep), kind=LOCAL, runs=tuple(picked))
        lease = leases.acquire(sweep.path / "leases", submission.lease)
        assert lease is not None, "submissions are numbered by the holder of the submitting lease alone"
        write_submission(submission)
    with lease:
        print(f"{len(picked)} run(s), {min(jobs, len(picked))} at a time; their output is in {sweep.path / 'logs'}", flush=True)
        return run_submission(sweep, submission, jobs)


def pick(sweep: Sweep, wanted: Collection[str]) -> list[str]:
    """Return the ids of the runs in one of the wanted states that nobody is to run yet, in the manifest's order."""
    queued = queued_runs(sweep)
    return [run_id for run_id, run in states_of(sweep).items() if run.state in wanted and run_id not in queued]


def queued_runs(sweep: Sweep) -> set[str]:
    """Return the ids of the runs that a living submission has yet to run, or is running.

    Raises:
        RunFailed: Slurm does not answer.
    """
    submissions, found = read_submissions(sweep), set()
    arrays = {submission.job: submission for submission in submissions if submission.kind == SLURM and submission.job}
    if arrays and shutil.which("squeue"):
        found = {arrays[job].runs[position] for job, position in slurm.queued_tasks(list(arrays)) if job in arrays}
    living = leases.alive(sweep.path / "leases")
    for submission in submissions:
        if submission.kind == LOCAL and submission.lease in living:
            found |= {run_id for run_id in submission.runs if not _has_ended_since(sweep, run_id, submission)}
    return found


def _has_ended_since(sweep: Sweep, run_id: str, submission: Submission) -> bool:
    """Say whether the last attempt at a run ended after a submission was written; both times are the file system's."""
    try:
        return attempt_file(sweep, run_id).stat().st_mtime_ns > submission.file.stat().st_mtime_ns
    except FileNotFoundError:
        return False


def _tell_picked(sweep: Sweep, picked: Collection[str], wanted: Collection[str]) -> None:
    """Say how many runs are submitted, and why the others are not."""
    if picked:
        return
    counts = Counter(run.state for run in states_of(sweep).values())
    told = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    hints = ["those are queued already"] if any(counts[state] for state in wanted) else []
    hints += ["`dist-vsd sweep retry` submits the failed ones"] if counts[FAILED] and FAILED not in wanted else []
    print("; ".join([f"nothing to submit: {told or 'no runs are planned'}", *hints]))


def _submitting(sweep: Sweep) -> leases.Lease:
    """Take the lease that lets one process at a time hand out a sweep's runs; ValueError if another keeps it for too long."""
    deadline = time.monotonic() + OTHERS_SUBMIT_WITHIN_SECONDS
    while (lease := leases.acquire(sweep.path / "leases", "submit")) is None:
        if time.monotonic() > deadline:
            raise ValueError(f"another submit is at work on {sweep.path}: wait until it has ended")
        time.sleep(0.2)
    return lease


def _cut(runs: list[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(runs[start : start + size]) for start in range(0, len(runs), size)]
