"""Of `benchmarks/gpu.py`: what is promised of whole runs, each a process of its own as users start it."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gpu_items import Item, Place, Skipped, within
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
LAUNCH_CONFIGS = sorted(file.stem for file in (ROOT / "launch_configs").glob("*.yaml"))
NOT_FOR_ONE_GPU = {"cpu": "it leaves GPUs alone", "multi_node": "it wants two machines"}
IN_SMALL = ("multi_gpu",)  # with fp16 a CPU is refused, and one launch configuration shows that they can be started
TRAIN = ["train", "a green duck", "--num-particles", "2", "--keep-checkpoints", "9", "--log-every", "1", "--check-every", "1"]
TRAIN += ["--preview-every", "1000", "--no-turntables", "--wandb.mode", "disabled"]
SMALL = ["--render-size", "16", "--field.num-samples", "8", "--field.dense-grid.resolutions", "8"]
SMALL += ["--field.hash-grid.log2-table-size", "8", "--field.hash-grid.num-levels", "4"]
UPDATES, MIDDLE = 4, 2
TOGETHER = 3  # processes at once: most of a start is imports
SECONDS_OF_A_RUN = 90.0
DDP_BOUND = 1e-2  # of parameters after two updates: kernels that torch chooses may add up in any order, and Adam follows signs


def items(place: Place) -> list[Item]:
    """Return the items, most valuable first."""
    found = [Item("promises", "--deterministic, resuming and --particles.offload give the same bits", 60, lambda: same_bits(place))]
    for launcher in ("torchrun's variables",) if place.small else ("torchrun's variables", "accelerate launch"):
        found.append(Item("promises", f"DDP over one rank, {launcher}", 30, functools.partial(ddp, place, launcher)))
    names = [name for name in LAUNCH_CONFIGS if name not in NOT_FOR_ONE_GPU and (not place.small or name in IN_SMALL)]
    return [*found, Item("promises", "launch configurations", 30 + 12 * len(names), lambda: launches(place, names))]


def started(words: Sequence[str], **variables: str) -> str:
    """Run Python with some words to its end; return what it printed.

    Raises:
        RuntimeError: its exit code was not 0; with its last line.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | variables
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=SECONDS_OF_A_RUN)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        # A launcher has the last word; the error itself stands before it.
        told = [line for line in lines if "Error" in line and "ChildFailedError" not in line and "CalledProcessError" not in line]
        raise RuntimeError(f"exit code {done.returncode}: {(told or lines or ['nothing was said'])[-1].strip()[:250]}")
    return done.stdout


def train(place: Place, folder: Path, *words: str) -> str:
    """Run `dist-vsd train` into a folder."""
    length = ["--num-updates", str(UPDATES), "--checkpoint-every", str(MIDDLE)]
    return started(["-m", "dist_vsd", *TRAIN, *length, *(SMALL if place.small else []), "--run-dir", str(folder), *words])


def tensors_of(folder: Path, update: int) -> dict[str, torch.Tensor]:
    """Return all tensors of a run's checkpoint, by file and name."""
    checkpoint = folder / "checkpoints" / f"update_{update:08d}"
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {f"{file.relative_to(checkpoint)}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def same_bits(place: Place) -> dict[str, Any]:
    """Run in the deterministic mode: twice, with particles in main memory, and resumed half-way; compare the last checkpoints."""
    words = ["--deterministic", "--field.encoding", "hash"]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        more = {"once": [], "again": [], "offloaded": ["--particles.offload"]}
        with ThreadPoolExecutor(1 if place.small else TOGETHER) as pool:
            for run in [pool.submit(train, place, folder / name, *words, *own) for name, own in more.items()]:
                run.result()
        shutil.copytree(folder / "once", folder / "resumed")
        shutil.rmtree(folder / "resumed" / "checkpoints" / f"update_{UPDATES:08d}")
        started(["-m", "dist_vsd", "train", "--resume", "--run-dir", str(folder / "resumed")])
        expected, checks = tensors_of(folder / "once", UPDATES), []
        for name in ("again", "resumed", "offloaded"):
            found = tensors_of(folder / name, UPDATES)
            differ = [key for key in expected.keys() | found.keys() if not same(expected.get(key), found.get(key))]
            checks.append(within(f"tensors that differ: {name}", len(differ), 0))
    mode = "torch.use_deterministic_algorithms, CUBLAS_WORKSPACE_CONFIG (dist_vsd.device.use_fixed_order); fields by plain torch"
    return {"checks": checks, "figures": {"tensors compared": len(expected), "the mode": mode}}


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Say whether both are there with the same bits."""
    return one is not None and other is not None and torch.equal(one, other)


def free_port() -> str:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def accelerate_words(config: str) -> list[str]:
    """Return the words after `python` that start one rank by a launch configuration."""
    file = ROOT / "launch_configs" / f"{config}.yaml"
    port = [] if config == "single_gpu" else ["--main_process_port", free_port()]
    return ["-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "1", *port]


def ddp(place: Place, launcher: str) -> dict[str, Any]:
    """Make updates with phi under DistributedDataParallel in a process group of one rank, and the same without; see gpu_ddp.py."""
    words = [str(ROOT / "benchmarks" / "gpu_ddp.py"), *(["--small"] if place.small else [])]
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    if launcher == "accelerate launch":
        printed = started([*accelerate_words("multi_gpu"), *words])
    else:
        printed = started(words, **variables)
    found = json.loads(printed.strip().splitlines()[-1])
    differences = found.pop("differences")
    return {"checks": [within(name, value, DDP_BOUND) for name, value in differences.items()], "figures": found}


def launch(place: Place, config: str, folder: Path) -> str:
    """Make two updates by a launch configuration; return what went wrong."""
    length = ["--num-updates", "2", "--checkpoint-every", "2"]
    words = ["-m", "dist_vsd", *TRAIN, *length, *(SMALL if place.small else []), "--run-dir", str(folder / config)]
    try:
        started([*accelerate_words(config), *words])
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if tensors_of(folder / config, 2) else "no checkpoint was written"


def launches(place: Place, names: list[str]) -> dict[str, Any]:
    """Make two updates of the embedded prior by each launch configuration that one GPU can serve."""
    if importlib.util.find_spec("deepspeed") is None:
        names = [name for name in names if "deepspeed" not in name]
    if not names:
        raise Skipped("nothing to launch")
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(1 if place.small else TOGETHER) as pool:
        wrong = dict(zip(names, pool.map(lambda name: launch(place, name, Path(made)), names), strict=True))
    left_out = {name: NOT_FOR_ONE_GPU.get(name, "deepspeed is not installed") for name in LAUNCH_CONFIGS if name not in names}
    figures = {f"why {name} did not run": reason for name, reason in wrong.items() if reason}
    figures |= {} if place.small else {f"{name} is left out": reason for name, reason in left_out.items()}
    return {"checks": [within(f"{name} failed", float(bool(reason)), 0) for name, reason in wrong.items()], "figures": figures}
