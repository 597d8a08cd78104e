"""This process among its fellows: device, rank, precision and ZeRO stage, from accelerate."""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from dist_vsd.device import use_full_fp32
from dist_vsd.distributed.heartbeat import Heartbeat, begin_heartbeat, leave_heartbeat, lost_after_seconds
from dist_vsd.distributed.launch_checks import check_launch, check_zero, is_set, resolve_precision
from dist_vsd.distributed.launcher import stop_with_launcher
from dist_vsd.distributed.store import StoreAddress, open_store, refuse_together, unreachable

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin


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
    stop_with_launcher()
    on_cpu = not torch.cuda.is_available() or is_set("ACCELERATE_USE_CPU")
    resolved, lost_after = "", 0.0
    try:
        if not refusal:
            lost_after = lost_after_seconds()
            check_launch()
            resolved = resolve_precision(precision, on_cpu)
    except ValueError as error:
        refusal = str(error)
    store = open_store(refusal)
    heartbeat = _first_beat(lost_after) if store is not None and not refusal else None
    refuse_together(store, "launch", refusal)
    if heartbeat is not None:
        begin_heartbeat(heartbeat)
    use_full_fp32()
    if on_cpu:
        keep_freed_memory()
    accelerator = _make_accelerator(on_cpu, store, timeout_seconds)
    if on_cpu and accelerator.num_processes > 1:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    plugin = accelerator.deepspeed_plugin if is_set("ACCELERATE_USE_DEEPSPEED") else None
    if plugin is not None:
        refuse_together(store, "zero", _message_of_zero(plugin))
        _set_up_deepspeed(plugin)
    stage = plugin.zero_stage if plugin is not None else 0
    return Process(accelerator.device, accelerator.process_index, accelerator.num_processes, accelerator, resolved, stage)


def leave_process_group() -> None:
    """Take the process group down, if there is one: threads that it leaves behind can abort the interpreter as it ends.

    NCCL would wait for ranks that are lost; there the group is left to the end of the process when an error is on its way.
    """
    error = sys.exc_info()[1]
    leave_heartbeat(error)
    if dist.is_initialized() and (dist.get_backend() == "gloo" or error is None):
        dist.destroy_process_group()


def _first_beat(lost_after: float) -> Heartbeat:
    try:
        return Heartbeat(StoreAddress.of_launcher(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), lost_after)
    except dist.DistError as error:
        raise unreachable() from error


def _leave_losses_to_heartbeat() -> None:
    """Keep NCCL's watchdog from aborting this process before it can say which rank is lost, and write the run's outcome.

    torch's own choices, 1 (what torchrun sets) and 3, end the process by SIGABRT as soon as NCCL reports a broken connection, or
    at the collective's timeout. With 2 the watchdog aborts the communicators alone: what waits in them returns, the next
    collective raises, and so ends as gloo's do. Nothing computed in between is kept, since a checkpoint begins and ends with a
    collective. Where not even that returns the heartbeat ends the process, long before the watchdog's own monitor does
    (TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC, 8 minutes) and the collective's timeout, which stays for ranks that live but wait for
    different things. A value of the user's own is left: 0 or 3, since torchrun's 1 can't be told from theirs.
    Not run on GPUs yet: read from torch 2.13's ProcessGroupNCCL.hpp (ErrorHandlingMode).
    """
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    is_torchruns = os.environ.get(name) == "1" and "TORCHELASTIC_RUN_ID" in os.environ
    if "NCCL_ASYNC_ERROR_HANDLING" not in os.environ and (name not in os.environ or is_torchruns):  # the former: its old name
        os.environ[name] = "2"


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


def _keep_deepspeed_from_compiling() -> None:
    """Take DeepSpeed's own all-reduce in shared memory away, which it compiles at a CPU's first start: gloo does that work.

    The build wants a compiler and takes a minute, and a process that is killed while it builds or loads leaves a lock file behind
    (torch.utils.file_baton) for which every later start waits without an end.
    """
    from deepspeed import ops

    ops.__compatible_ops__ = {}  # asked for this one operation alone; the list is else made by trying a compiler


def _make_accelerator(on_cpu: bool, store: dist.Store | None, timeout_seconds: float) -> Accelerator:
    """Form the process group (collective).

    accelerate takes "no GPU" to mean one process unless a group is there or it is told cpu=True; but the latter turns DeepSpeed
    off without a word. The group is made here, on the store of this attempt: see ``_open_store``.
    """
    deepspeed = is_set("ACCELERATE_USE_DEEPSPEED")
    if deepspeed and on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    if deepspeed:
        _keep_deepspeed_from_compiling()
    from accelerate import Accelerator, InitProcessGroupKwargs

    backend = "gloo" if on_cpu else "nccl"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if store is not None:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if not on_cpu:
            _leave_losses_to_heartbeat()
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    handlers = [InitProcessGroupKwargs(backend=backend, timeout=timeout)] if "LOCAL_RANK" in os.environ else []
    accelerator = Accelerator(mixed_precision="no", cpu=on_cpu and not deepspeed, kwargs_handlers=handlers)
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", accelerator.num_processes)), accelerator.num_processes
    return accelerator


