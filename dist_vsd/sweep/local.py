"""A submission without Slurm: a few runs at a time on this machine."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from dist_vsd.sweep.attempts import DONE, STOPPED, last_word
from dist_vsd.sweep.child_process import PassedOn, StopSignals, start
from dist_vsd.sweep.launch import DIST_VSD
from dist_vsd.sweep.manifest import Sweep
from dist_vsd.sweep.submissions import Submission, find_run

POLL_SECONDS = 0.1


def run_submission(sweep: Sweep, submission: Submission, jobs: int) -> int:
    """Run a submission's runs, some at a time, with a line as each ends; a signal to stop makes all save and stop.

    Args:
        sweep: that they are of.
        submission: local; this process holds its lease.
        jobs: runs at the same time.

    Returns:
        0 if all are done, 75 if it was stopped, 1 if a run failed.
    """
    stop, passed_on = StopSignals().install(), PassedOn()
    waiting, total = list(range(len(submission.runs)))[::-1], len(submission.runs)
    free_slots = list(range(jobs))[::-1]
    running: dict[subprocess.Popen, tuple[int, int, float]] = {}
    codes: list[int] = []
    while running or (waiting and not stop.received):
        while waiting and free_slots and not stop.received:
            task, slot = waiting.pop(), free_slots.pop()
            running[_start_task(sweep, submission, task, slot, jobs)] = (task, slot, time.monotonic())
        time.sleep(POLL_SECONDS)
        passed_on.send(stop.received, [child.pid for child in running])
        for child in [child for child in running if child.poll() is not None]:
            task, slot, begin = running.pop(child)
            free_slots.append(slot)
            code, words = _ending(sweep, submission.runs[task], child.returncode)
            codes.append(code)
            minutes = (time.monotonic() - begin) / 60
            print(f"[{len(codes)}/{total}] {submission.runs[task]}: {words} after {minutes:.1f} minutes", flush=True)
    if waiting or STOPPED in codes:
        print(f"stopped with {codes.count(DONE)} of {total} runs done; what was begun is saved: submit again to go on", flush=True)
        return STOPPED
    return 1 if any(codes) else 0


def _start_task(sweep: Sweep, submission: Submission, task: int, slot: int, jobs: int) -> subprocess.Popen:
    environment = dict(os.environ) | _share_of_machine(slot, jobs, sweep.settings.num_processes)
    command = [*DIST_VSD, "sweep", "run", str(sweep.path), "--submission", str(submission.file), "--task", str(task)]
    log = sweep.path / "logs" / f"local_{submission.file.stem}_{task}.out"
    log.parent.mkdir(exist_ok=True)
    with open(log, "ab") as stream:
        return start(command, stream, environment)


def _ending(sweep: Sweep, run_id: str, child_code: int) -> tuple[int, str]:
    """Return the exit code of a task's run, and words for it."""
    word = last_word(sweep, find_run(sweep, run_id))
    if child_code == DONE:
        return DONE, "done" if word and word.exit_code == DONE else "left to the process that has it"
    if child_code == STOPPED:
        return STOPPED, "stopped early, saved"
    return child_code, f"failed: {word.error}" if word and word.error else f"failed with {child_code}, see logs/"


def _share_of_machine(slot: int, jobs: int, num_processes: int) -> dict[str, str]:
    """Return the variables that keep runs at the same time off each other's cores and GPUs."""
    share = {}
    if "OMP_NUM_THREADS" not in os.environ:
        share["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // (jobs * num_processes)))
    gpus = devices_of_slot(slot, num_processes, _visible_gpus())
    return share | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})


def devices_of_slot(slot: int, num_processes: int, gpus: list[str]) -> list[str]:
    """Return the GPUs of one of the runs at the same time: a share of its own as long as there are enough, in turn otherwise.

    Args:
        slot: 0 to jobs - 1.
        num_processes: ranks of a run, a GPU each.
        gpus: all that may be used; none on a CPU.
    """
    return list(dict.fromkeys(gpus[(slot * num_processes + rank) % len(gpus)] for rank in range(num_processes))) if gpus else []


def _visible_gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    return sorted((file.name[6:] for file in Path("/dev").glob("nvidia[0-9]*")), key=int)
