"""Timed runs of `dist-vsd train` as processes of their own, and what their run directories say."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from dist_vsd.errors import RunFailed
from dist_vsd.priors.pipeline_folder import find_pipeline
from dist_vsd.scaling.machine import PACKAGE, Places

STAGES = ("render", "scores", "backward", "phi")
MEMORY_AREA, SENT = "memory/", "communication/sent_mib"
BYTES_OF = {"fp32": 4, "bf16": 2, "fp16": 2}
MIB = 2**20
SECONDS_TO_STOP = 30
# launch_configs/cpu.yaml without its comments: an installed package has no launch_configs/ beside it.
LAUNCHER = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",  # accelerate's word for N processes; without CUDA they meet on gloo
    "num_machines": 1,
    "machine_rank": 0,
    "mixed_precision": "no",
    "dynamo_backend": "NO",
    "main_training_function": "main",
    "use_cpu": False,
}
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to be timed, or several like it at the same time that know nothing of each other.

    Attributes:
        num_ranks: of each run.
        num_particles: of each run, over its ranks.
        num_runs: independent runs at the same time.
    """

    num_ranks: int
    num_particles: int
    num_runs: int = 1

    def __str__(self) -> str:
        one = f"{self.num_ranks} rank(s), {self.num_particles} particle(s)"
        return one if self.num_runs == 1 else f"{self.num_runs} independent runs at once, {one} each"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of a measurement share.

    Attributes:
        prompt: of the particles.
        words: further words for `train`, such as ("--preset", "embedded").
        num_updates: of each run.
        num_warmup: the first updates, which are left out of every figure.
    """

    prompt: str
    words: tuple[str, ...]
    num_updates: int
    num_warmup: int


@dataclasses.dataclass(frozen=True)
class Timing:
    """What a run's metrics say about one update on a rank.

    Attributes:
        seconds_per_update: the median over updates (of the mean over ranks).
        stages: seconds by stage; they sum to at most seconds_per_update.
        sent_bytes_per_update: that a rank sends; None if the run did not report it.
        peak_memory_mib: of a rank, the largest of the run's memory figures; None if it did not report any.
    """

    seconds_per_update: float
    stages: dict[str, float]
    sent_bytes_per_update: float | None
    peak_memory_mib: float | None


@dataclasses.dataclass(frozen=True)
class RunSizes:
    """What a run holds, and how much of it an update takes at once.

    Attributes:
        theta_numbers: optimised numbers of one particle.
        phi_numbers: of phi; 0 for an objective without it.
        prior_bytes: of the frozen UNet and VAE in the run's precision.
        num_views: of each particle in an update, over all ranks.
        micro_batch_size: renders that pass through the networks together.
        steps_per_update: of phi.
    """

    theta_numbers: int
    phi_numbers: int
    prior_bytes: int
    num_views: int
    micro_batch_size: int
    steps_per_update: int


def run_job(job: Job, settings: Settings, places: Places, folder: Path) -> tuple[Timing, RunSizes]:
    """Run a job to its end.

    Args:
        job: what to run.
        settings: of all jobs.
        places: for its ranks; run i of several begins at place i.
        folder: for run directories and logs; made here, must not exist.

    Returns:
        The timing (of several runs their mean, and the largest memory) and the sizes.

    Raises:
        ValueError: `train` refused its words; with its own line.
        RunFailed: a run failed; with the end of its output.
    """
    folder.mkdir()
    launcher = folder / "launcher.yaml"
    launcher.write_text(yaml.safe_dump(LAUNCHER | {"num_processes": job.num_ranks}))
    names = [f"run_{i}" for i in range(job.num_runs)]
    processes: list[subprocess.Popen] = []
    try:
        for i, name in enumerate(names):
            with open(folder / f"{name}.log", "w") as log:
                command = train_command(job, settings, folder / name, launcher)
                environment = run_environment(os.environ, places.environment(i))
                processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
        codes = [process.wait() for process in processes]
    finally:
        stop(processes)
    for name, code in zip(names, codes, strict=True):
        require_success(job, code, (folder / f"{name}.log").read_text(errors="replace"))
    timings = [summarize(read_metrics(folder / name / "metrics.jsonl"), settings.num_warmup) for name in names]
    return mean_timing(timings), read_sizes(folder / names[0])


def train_command(job: Job, settings: Settings, run_dir: Path, launcher: Path) -> list[str]:
    """Return the words that start one run, alone or on several ranks by accelerate."""
    command = [sys.executable]
    if job.num_ranks > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(launcher), "--main_process_port", "0"]
    command += ["-m", "dist_vsd.scaling.pinned", "train", settings.prompt, *settings.words]
    command += ["--num-particles", str(job.num_particles), "--num-updates", str(settings.num_updates), "--run-dir", str(run_dir)]
    command += ["--log-every", "1", "--no-turntables"]
    # Once, after the last update, which is timed before.
    for flag in ("--checkpoint-every", "--check-every", "--preview-every"):
        command += [flag, str(settings.num_updates)]
    return command


def run_environment(inherited: Mapping[str, str], place: Mapping[str, str]) -> dict[str, str]:
    """Return a run's environment: one thread a rank, this package, its place, and nothing of a launcher around us."""
    kept = {name: value for name, value in inherited.items() if name not in LAUNCHED}
    path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [inherited.get("PYTHONPATH")])])
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, **place}


def stop(processes: Iterable[subprocess.Popen]) -> None:
    """End what still runs: after a failure, or Ctrl-C."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def require_success(job: Job, code: int, output: str) -> None:
    """Raise what a run ended with, unless it is done."""
    if code == 0:
        return
    lines = [line for line in output.splitlines() if line.strip()]
    refused = [line.removeprefix("dist-vsd: error: ") for line in lines if line.startswith("dist-vsd: error: ")]
    if refused:
        raise ValueError(refused[0])
    failed = [line.removeprefix("dist-vsd: failed: ") for line in lines if line.startswith("dist-vsd: failed: ")]
    raise RunFailed(f"the run with {job} ended with exit code {code}: {' | '.join(failed or lines[-3:])}")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl that hold the seconds of an update."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in lines if line.get("seconds/update") is not None]


def summarize(lines: Sequence[Mapping[str, Any]], num_warmup: int) -> Timing:
    """Return the timing of a run.

    The machine may be busy with other things, so an update counts by the median. The stages divide that median as they
    divide the updates of the middle half: medians of stages, taken one by one, could sum to more than an update.

    Args:
        lines: of metrics.jsonl, one an update.
        num_warmup: updates that are left out.
    """
    measured = sorted((line for line in lines if line["update"] > num_warmup), key=lambda line: line["seconds/update"])
    if not measured:
        raise RunFailed(f"no update after the first {num_warmup} was logged")
    seconds = statistics.median(line["seconds/update"] for line in measured)
    quarter = len(measured) // 4
    middle = measured[quarter : len(measured) - quarter]
    total = sum(line["seconds/update"] for line in middle)
    stages = {name: seconds * sum(line.get(f"seconds/{name}") or 0.0 for line in middle) / total for name in STAGES}
    sent = [line[SENT] for line in measured if line.get(SENT) is not None]
    memory = [value for line in lines for name, value in line.items() if name.startswith(MEMORY_AREA) and value is not None]
    return Timing(seconds, stages, MIB * statistics.median(sent) if sent else None, max(memory, default=None))


def mean_timing(timings: Sequence[Timing]) -> Timing:
    """Return the mean of runs at the same time, and the largest memory."""
    mean = statistics.fmean
    sent = [t.sent_bytes_per_update for t in timings if t.sent_bytes_per_update is not None]
    memory = [t.peak_memory_mib for t in timings if t.peak_memory_mib is not None]
    return Timing(
        mean(t.seconds_per_update for t in timings),
        {name: mean(t.stages[name] for t in timings) for name in STAGES},
        mean(sent) if sent else None,
        max(memory, default=None),
    )


def read_sizes(run_dir: Path) -> RunSizes:
    """Return what a finished run holds, by the headers of its newest checkpoint and of the prior's weights."""
    checkpoint = max((run_dir / "checkpoints").glob("update_*"))
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    particle = numbers_by_name(checkpoint / "particles" / "0000.safetensors")
    # Theta's file holds grids that are not optimised too; Adam has one first moment for each number that is.
    theta = sum(count for name, count in particle.items() if name.startswith("optimizer/") and name.endswith("/exp_avg"))
    phi_file = checkpoint / "phi.safetensors"
    phi = sum(numbers_by_name(phi_file).values()) if phi_file.exists() else 0
    pipeline = find_pipeline(config["prior"])
    prior = sum(math.prod(shape) for component in ("unet", "vae") for shape in pipeline.shapes(component).values())
    return RunSizes(
        theta,
        phi,
        prior * BYTES_OF[config["precision"]],
        num_views=config.get("num_views") or 1,
        micro_batch_size=config["micro_batch_size"],
        steps_per_update=config["score"]["steps_per_update"],
    )


def numbers_by_name(file: Path) -> dict[str, int]:
    """Return how many numbers each tensor of a safetensors file has; only its header is read."""
    with safe_open(file, "pt") as opened:
        return {name: math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - no iterator
