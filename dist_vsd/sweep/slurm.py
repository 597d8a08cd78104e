"""Talking to Slurm: every word of the user's is one element of an argument list, never part of a shell line or of a script."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

from dist_vsd.errors import RunFailed
from dist_vsd.sweep.submissions import Submission

SCRIPT = "sweep.sbatch"
ANSWER_SECONDS = 60.0  # a controller under load takes its time


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """Options of sbatch, as its own flags of the same names; an empty one leaves the line of the script."""

    partition: str = ""
    """Where the tasks run."""
    time: str = ""
    """Limit of a task, as sbatch takes it (04:00:00); a run that needs longer saves, requeues itself and goes on."""
    gpus_per_node: str = ""
    """GPUs of a task: a number, or type:number."""
    cpus_per_task: str = ""
    """CPU cores of a task."""
    mem: str = ""
    """Memory of a task, as sbatch takes it (32G)."""
    account: str = ""
    """Who pays."""
    signal_seconds: int = 0
    """Seconds before the time limit at which a task begins to save; 0: what the script says."""
    limit: int = 0
    """Tasks that run at the same time; 0: as many as Slurm gives."""

    def __post_init__(self) -> None:
        for name in ("signal_seconds", "limit"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(self, name)}")

    def flags(self) -> list[str]:
        """Return the flags of sbatch that are given."""
        names = ("partition", "time", "gpus_per_node", "cpus_per_task", "mem", "account")
        flags = [f"--{name.replace('_', '-')}={getattr(self, name)}" for name in names if getattr(self, name)]
        return [*flags, f"--signal=B:USR1@{self.signal_seconds}"] if self.signal_seconds else flags


def require(options: SlurmOptions) -> None:
    """Check that there is a Slurm that takes these options; asks it, submits nothing.

    Raises:
        ValueError: sbatch is not on this machine, or the partition does not exist.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("no sbatch on this machine: submit where Slurm is, or run here with --local --jobs N")
    if not options.partition:
        return
    partitions = sorted(set(_ask("sinfo", "--noheader", "--all", "--format=%R").split()))
    wrong = [name for name in options.partition.split(",") if name not in partitions]
    if wrong:
        raise ValueError(f"partition {wrong[0][:80]!r} does not exist: use one of {', '.join(partitions)}")


def largest_array() -> int:
    """Return how many tasks one array job may have."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config"), re.MULTILINE)
    if found is None or int(found[1]) < 1:
        raise ValueError("this Slurm takes no array jobs (MaxArraySize of `scontrol show config`): use --local on a node of its")
    return int(found[1])


def copy_script(sweep_path: Path) -> None:
    """Copy the array's script, as it ships, into a sweep's directory, unless there is one, which the user may have edited."""
    with contextlib.suppress(FileExistsError), open(sweep_path / SCRIPT, "x") as file:
        file.write((Path(__file__).parent / SCRIPT).read_text())


def sbatch_command(sweep_path: Path, submission: Submission, options: SlurmOptions, after: str = "") -> list[str]:
    """Return the sbatch command of a submission.

    Args:
        sweep_path: of the sweep.
        submission: whose runs are the array's tasks.
        options: of the user.
        after: an array job that has to end first.
    """
    path = sweep_path.absolute()
    tasks = f"0-{len(submission.runs) - 1}" + (f"%{options.limit}" if options.limit else "")
    output = str(path / "logs").replace("%", "%%") + "/slurm_%A_%a.out"
    command = ["sbatch", "--parsable", f"--array={tasks}", f"--output={output}", *options.flags()]
    command += [f"--dependency=afterany:{after}"] if after else []
    return [*command, str(path / SCRIPT), str(path), str(submission.file.absolute()), sys.executable]


def submit(command: list[str]) -> str:
    """Run an sbatch command and return the job's id; ValueError, in sbatch's words, if it refuses."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ValueError(f"sbatch refuses: {_last_line(done.stderr).removeprefix('sbatch: error: ')}; change the options")
    return done.stdout.strip().partition(";")[0]  # "id;cluster" on a federation


def queued_tasks(jobs: list[str]) -> set[tuple[str, int]]:
    """Return (array job, position) of the tasks that wait or run; an ended job has none.

    Raises:
        RunFailed: Slurm does not answer.
    """
    found = set()
    for start in range(0, len(jobs), 100):
        for line in _ask("squeue", "--noheader", "--array", "--format=%F %K", f"--jobs={','.join(jobs[start : start + 100])}").splitlines():
            job, _, position = line.strip().partition(" ")
            if position.isdigit():
                found.add((job, int(position)))
    return found


def cancel(job: str) -> None:
    """Take a job's waiting tasks out of the queue, and ask the running ones to save and stop."""
    _ask("scancel", "--quiet", "--state=PENDING", job)
    _ask("scancel", "--quiet", "--state=RUNNING", "--batch", "--signal=USR1", job)


def _ask(*command: str) -> str:
    """Return what a Slurm command prints; nothing about a job that Slurm has forgotten."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=ANSWER_SECONDS)
    except FileNotFoundError:
        raise RunFailed(f"{command[0]} is not on this machine: ask where Slurm is") from None
    except subprocess.TimeoutExpired:
        raise RunFailed(f"{command[0]} gave no answer within {ANSWER_SECONDS:.0f} s: try again when Slurm is up") from None
    if done.returncode and "Invalid job id" not in done.stderr:
        raise RunFailed(f"{command[0]} failed: {_last_line(done.stderr)}")
    return done.stdout


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
