"""What is checked of a launch: the launcher's words against this machine and the flags, and that all ranks run the same thing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from dist_vsd import __version__
from dist_vsd.distributed.launcher import launchers_precision
from dist_vsd.distributed.layout import ranks_in_words
from dist_vsd.distributed.store import RANK_VARIABLES

if TYPE_CHECKING:
    from dist_vsd.distributed.collectives import Collectives

PACKAGES = ("torch", "accelerate", "diffusers", "peft", "deepspeed")
# What accelerate launch tells of its YAML, as far as it changes what is computed.
LAUNCH_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE")


def check_launch() -> None:
    """Check what the launcher says against this machine, before anything is joined.

    Raises:
        ValueError: the launcher's variables are incomplete, more ranks than GPUs on this node, DeepSpeed wanted but not
            installed, or a way of distributing that we don't support.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        missing = [name for name in RANK_VARIABLES if name not in os.environ]
        if missing:
            raise ValueError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(missing)} not set: start the ranks by `accelerate launch`"
            )
    num_local, num_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if num_local > num_gpus > 0:
        raise ValueError(
            f"each rank needs a GPU of its own, got {num_local} ranks on a node of {num_gpus}: use --num_processes {num_gpus}, "
            "or launch_configs/cpu.yaml to leave the GPUs alone"
        )
    if is_set("ACCELERATE_USE_DEEPSPEED") and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            "the launch configuration asks for DeepSpeed, which is not installed: pip install dist_vsd[deepspeed], "
            "or use launch_configs/multi_gpu.yaml"
        )
    for kind in ("FSDP", "MEGATRON_LM"):
        if is_set(f"ACCELERATE_USE_{kind}"):
            raise ValueError(f"the launch configuration asks for {kind}, which dist_vsd has no use for: take one of launch_configs/")


def resolve_precision(precision: str, on_cpu: bool) -> str:
    """Return the precision of the frozen networks from the run's configuration and the launcher.

    Args:
        precision: fp32, bf16, fp16, or empty where none was given. A preset's has given way to the launcher's before
            (commands/train_words.py), so that what differs here is what a flag, a file or the saved run asks for.
        on_cpu: whether there is no GPU.

    Returns:
        fp32, bf16 or fp16.

    Raises:
        ValueError: both are given and differ, the launcher's is none of these, or fp16 on a CPU.
    """
    launcher = launchers_precision()
    if precision and launcher and precision != launcher:
        raise ValueError(
            f"the precision is {precision} but the launcher's mixed_precision is {launcher}: "
            f"leave --precision (or the file's) out, or launch with --mixed_precision {'no' if precision == 'fp32' else precision}"
        )
    resolved = precision or launcher or "fp32"
    if resolved == "fp16" and on_cpu:
        raise ValueError("precision fp16 needs a GPU: use fp32 or bf16")
    return resolved


def check_zero(stage: int, settings: Mapping[str, Any]) -> None:
    """Check the DeepSpeed part of a launch configuration.

    Args:
        stage: of ZeRO.
        settings: DeepSpeed's configuration, as accelerate made it.

    Raises:
        ValueError: a stage that shards nothing, or settings that would change the update.
    """
    if stage not in (1, 2, 3):
        raise ValueError(f"zero_stage must be 1, 2 or 3, got {stage}: change it, or use launch_configs/multi_gpu.yaml")
    steps = settings.get("gradient_accumulation_steps", 1)
    if steps not in (1, "auto"):
        raise ValueError(f"gradient_accumulation_steps must be 1, got {steps}: use --micro-batch-size for smaller batches")
    clipping = settings.get("gradient_clipping", 0.0)
    if clipping != "auto" and float(clipping) != 0.0:
        raise ValueError(f"gradient_clipping must be 0 or left out, got {clipping}: phi's gradient is not clipped")


def check_same_start(collectives: Collectives, config: Mapping[str, Any]) -> None:
    """Check that all ranks run the same thing: versions, launch configuration, configuration of the run (collective).

    Args:
        collectives: of the run.
        config: the resolved configuration as nested plain values.

    Raises:
        ValueError: on every rank alike; names the first thing that differs, the ranks and their values.
    """
    launch = {name.removeprefix("ACCELERATE_").lower(): os.environ.get(name, "") for name in LAUNCH_VARIABLES}
    starts = collectives.gather_json({"version of": versions(), "launcher's": launch, "configuration": _flat(config)})
    remedies = {
        "version of": "install the same packages on all nodes",
        "launcher's": "start all nodes with the same launch configuration",
        "configuration": "start all ranks with the same words and the same --config file",
    }
    for what, remedy in remedies.items():
        for name in dict.fromkeys(name for start in starts for name in start[what]):
            ranks_of: dict[str, list[int]] = {}
            for rank, start in enumerate(starts):
                ranks_of.setdefault(repr(start[what].get(name)), []).append(rank)
            if len(ranks_of) > 1:
                values = ", ".join(f"{value[:80]} on {ranks_in_words(ranks)}" for value, ranks in ranks_of.items())
                raise ValueError(f"{what} {name} must be the same on all ranks, got {values}: {remedy}")


def versions() -> dict[str, str]:
    """Return the versions that decide what is computed, by package; empty where one is not installed."""
    found = {"python": platform.python_version(), "dist_vsd": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def is_set(variable: str) -> bool:
    """Say whether one of the launcher's variables is switched on."""
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")
