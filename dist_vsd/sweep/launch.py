"""The command that starts a run, and the file that holds what it shall be: nothing of a prompt stands on a command line."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from dist_vsd.runs.outcome import CONFIG_FILE
from dist_vsd.sweep.manifest import PlannedRun, Sweep, nest

DIST_VSD = [sys.executable, "-m", "dist_vsd"]
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]
# accelerate's word for "start N processes on this node"; without CUDA they meet on gloo.
PLAIN_RANKS = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LONGEST_TAG = 64  # of wandb


def launch_command(sweep: Sweep, run: PlannedRun, config: Path) -> list[str]:
    """Return the command that starts a run, or goes on with one that was begun.

    Args:
        sweep: that it is of.
        run: which.
        config: written by ``write_run_config``.
    """
    settings, run_dir = sweep.settings, sweep.run_dir(run)
    command = DIST_VSD
    if settings.num_processes > 1:
        layout = ["--config_file", settings.launch_config] if settings.launch_config else PLAIN_RANKS
        num_processes = ["--num_processes", str(settings.num_processes)]
        command = [*LAUNCHER, *layout, *num_processes, "--main_process_port", "0", "-m", "dist_vsd"]  # port 0: any that is free
    resume = ["--resume"] if (run_dir / CONFIG_FILE).exists() else []
    return [*command, "train", "--preset", settings.preset, "--config", str(config), "--run-dir", str(run_dir), *resume]


def write_run_config(sweep: Sweep, run: PlannedRun) -> Path:
    """Write what a run differs in from its preset to a YAML file, whole or not at all, and return its path."""
    shown = {"wandb.group": sweep.settings.name, "wandb.tags": [tag[:LONGEST_TAG] for tag in run.tags if tag]}
    values = nest({**shown, **run.overrides, "prompt": run.prompt, "seed": run.seed})
    file = sweep.path / "configs" / f"{run.id}.yaml"
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(values, sort_keys=False))  # ASCII, whatever the prompt is and the locale says
    temporary.replace(file)
    return file
