"""This process among its fellows: device, rank, precision and ZeRO stage, from accelerate; and refusals of wrong launches.

Whatever a rank finds wrong before the process group exists is told to all the others through the launcher's store, so that
all of them end with the same line and the same exit code, and nobody waits for a rank that has gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import io
import logging
import os
import platform
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dist_vsd import __version__
from dist_vsd.errors import RunFailed

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    from dist_vsd.distributed.collectives import Collectives

# The launchers of all nodes have met before any rank starts, so ranks differ by the time of their imports alone.
JOIN_SECONDS = 300.0
PRECISION_OF_LAUNCHER = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
PACKAGES = ("torch", "accelerate", "diffusers", "peft", "deepspeed")
# What torchrun, and so accelerate launch, tells every rank.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What accelerate launch tells of its YAML, as far as it changes what is computed.
LAUNCH_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE")


@dataclasses.dataclass(frozen=True)
class Process:
    """Where this process runs, and how.

    Attributes:
        device: of this rank (by its local rank).
        rank: among all ranks.
        world_size: number of ranks.
        accelerator: accelerate's. Its own mixed precision is off in any case: we cast explicitly, by ``precision``.
        precision: of the frozen networks: fp32, bf16 or fp16.
        zero_stage: DeepSpeed's, 1 to 3; 0 without DeepSpeed.
    """

    device: torch.device
    rank: int
    world_size: int
    accelerator: Accelerator
    precision: str
    zero_stage: int


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of returning it to the kernel.

    On a CPU a third of a convolutional loop can go to page faults of large frees. Does nothing on another C library.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX of malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 64 * 2**20)):
            libc.mallopt(option, value)
    except (OSError, AttributeError):
        return


def start_process(precision: str = "", timeout_seconds: float = 600.0, refusal: str = "") -> Process:
    """Join the process group that the launcher set up, on gloo without a GPU and NCCL with one (collective).

    Started without a launcher it is one process.

    Args:
        precision: of the frozen networks; empty: what the launcher says (its mixed_precision; none is fp32).
        timeout_seconds: after which a collective that some rank never reaches fails, on the ranks that wait in it.
        refusal: what this rank has found wrong already; empty if nothing.

    Returns:
        This process.

    Raises:
        ValueError: on every rank alike, if any rank was started wrongly: see ``check_launch``, ``resolve_precision`` and
            ``check_zero``; or if a rank brings a ``refusal``.
    """
    on_cpu = not torch.cuda.is_available() or _is_set("ACCELERATE_USE_CPU")
    resolved = ""
    try:
        if not refusal:
            check_launch()
            resolved = resolve_precision(precision, on_cpu)
    except ValueError as error:
        refusal = str(error)
    store = _open_store(refusal)  # kept until the group exists: rank 0 may serve it
    _refuse_together(store, "launch", refusal)
    if on_cpu:
        keep_freed_memory()
    accelerator = _make_accelerator(on_cpu, store, timeout_seconds)
    if on_cpu and accelerator.num_processes > 1:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    plugin = accelerator.deepspeed_plugin if _is_set("ACCELERATE_USE_DEEPSPEED") else None
    if plugin is not None:
        _refuse_together(store, "zero", _message_of_zero(plugin))
        _set_up_deepspeed(plugin)
    stage = plugin.zero_stage if plugin is not None else 0
    return Process(accelerator.device, accelerator.process_index, accelerator.num_processes, accelerator, resolved, stage)


def leave_process_group() -> None:
    """Take the process group down, if there is one: threads that it leaves behind can abort the interpreter as it ends.

    NCCL would wait for ranks that are lost; there the group is left to the end of the process when an error is on its way.
    """
    if dist.is_initialized() and (dist.get_backend() == "gloo" or sys.exc_info()[0] is None):
        dist.destroy_process_group()


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
    if _is_set("ACCELERATE_USE_DEEPSPEED") and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            "the launch configuration asks for DeepSpeed, which is not installed: pip install dist_vsd[deepspeed], "
            "or use launch_configs/multi_gpu.yaml"
        )
    for kind in ("FSDP", "MEGATRON_LM"):
        if _is_set(f"ACCELERATE_USE_{kind}"):
            raise ValueError(f"the launch configuration asks for {kind}, which dist_vsd has no use for: take one of launch_configs/")


def resolve_precision(precision: str, on_cpu: bool) -> str:
    """Return the precision of the frozen networks from the flag and the launcher.

    Args:
        precision: fp32, bf16, fp16, or empty where none was given.
        on_cpu: whether there is no GPU.

    Returns:
        fp32, bf16 or fp16.

    Raises:
        ValueError: both are given and differ, the launcher's is none of these, or fp16 on a CPU.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in PRECISION_OF_LAUNCHER:
        raise ValueError(f"the launcher's mixed_precision must be one of {', '.join(PRECISION_OF_LAUNCHER)}, got {launcher!r}: change it")
    if precision and launcher != "no" and precision != launcher:
        raise ValueError(
            f"the precision is {precision} but the launcher's mixed_precision is {launcher}: "
            f"drop --precision, or launch with --mixed_precision {'no' if precision == 'fp32' else precision}"
        )
    resolved = precision or PRECISION_OF_LAUNCHER[launcher]
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


def _message_of_zero(plugin: DeepSpeedPlugin) -> str:
    try:
        check_zero(plugin.zero_stage, plugin.deepspeed_config)
    except ValueError as error:
        return str(error)
    return ""


def _set_up_deepspeed(plugin: DeepSpeedPlugin) -> None:
    """Fill what accelerate can't know without a data loader, and leave torch's AdamW and the gradient as they are."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # accelerate would make 1.0 of "auto"
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    # accelerate tells transformers about ZeRO 3 whatever zero3_init_flag says: it would load the text encoder in shards.
    unset_hf_deepspeed_config()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls torch's collectives by their old names, each call a warning.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def _make_accelerator(on_cpu: bool, store: dist.Store | None, timeout_seconds: float) -> Accelerator:
    """Form the process group (collective).

    accelerate takes "no GPU" to mean one process unless a group is there or it is told cpu=True; but the latter turns DeepSpeed
    off without a word. The group is made here, on the store of this attempt: see ``_open_store``.
    """
    deepspeed = _is_set("ACCELERATE_USE_DEEPSPEED")
    if deepspeed and on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    from accelerate import Accelerator, InitProcessGroupKwargs

    backend = "gloo" if on_cpu else "nccl"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if store is not None:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if not on_cpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    handlers = [InitProcessGroupKwargs(backend=backend, timeout=timeout)] if "LOCAL_RANK" in os.environ else []
    with contextlib.redirect_stdout(io.StringIO()) if deepspeed else contextlib.nullcontext():  # "... built successfully"
        accelerator = Accelerator(mixed_precision="no", cpu=on_cpu and not deepspeed, kwargs_handlers=handlers)
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", accelerator.num_processes)), accelerator.num_processes
    return accelerator


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def _open_store(refusal: str) -> dist.Store | None:
    """Connect to the launcher's store; None for a process that has no fellows, or can't find them.

    A launcher with --max_restarts keeps its store from one attempt to the next, and with it the addresses of ranks that are
    gone; so every attempt has keys of its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or (refusal and any(name not in os.environ for name in RANK_VARIABLES)):
        return None
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=JOIN_SECONDS)))
    except dist.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunFailed(f"the launcher's store at {address} can't be reached: see what the launcher of node 0 says") from error
    return dist.PrefixStore(f"dist_vsd/attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _refuse_together(store: dist.Store | None, about: str, refusal: str) -> None:
    """Raise the ValueError of the first rank that refuses on every rank (collective, without a process group).

    Raises:
        ValueError: see above.
        RunFailed: some rank never came.
    """
    refusals = [refusal]
    if store is not None:
        store.set(f"{about}/{os.environ['RANK']}", refusal)
        keys = [f"{about}/{rank}" for rank in range(int(os.environ["WORLD_SIZE"]))]
        try:
            refusals = [value.decode() for value in store.multi_get(keys)]  # waits for all ranks
        except dist.DistStoreError as error:
            missing = _ranks([rank for rank, key in enumerate(keys) if not store.check([key])])
            raise RunFailed(f"{missing} did not come within {store.timeout.total_seconds():.0f} s: see what they said") from error
    found = {rank: text for rank, text in enumerate(refusals) if text}
    if not found:
        return
    if store is not None:
        _wait_until_read(store, about)
    text = next(iter(found.values()))
    same = len(found) == len(refusals)
    raise ValueError(text if same else f"{text} (on {_ranks([r for r, other in found.items() if other == text])})")


def _wait_until_read(store: dist.Store, about: str) -> None:
    """Let rank 0, whose process may serve the store, end after the others have read what it holds."""
    store.set(f"{about}/read/{os.environ['RANK']}", "")
    if os.environ["RANK"] == "0":
        with contextlib.suppress(dist.DistStoreError):  # a rank that died meanwhile
            store.wait([f"{about}/read/{rank}" for rank in range(int(os.environ["WORLD_SIZE"]))], datetime.timedelta(seconds=30))


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
                values = ", ".join(f"{value[:80]} on {_ranks(ranks)}" for value, ranks in ranks_of.items())
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


def _ranks(ranks: list[int]) -> str:
    """Write ranks in words: "rank 3", "ranks 0-6, 8"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    words = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {words}"
