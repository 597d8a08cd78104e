"""This process among its fellows: device, rank and world size, from accelerate."""

from __future__ import annotations

import ctypes
import dataclasses
import os

import torch
from accelerate import Accelerator, InitProcessGroupKwargs


@dataclasses.dataclass(frozen=True)
class Process:
    """Where this process runs.

    Attributes:
        device: of this rank (by its local rank).
        rank: among all ranks.
        world_size: number of ranks.
    """

    device: torch.device
    rank: int
    world_size: int


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


def start_process() -> Process:
    """Join the process group that the launcher set up, on gloo without a GPU and NCCL with one (collective).

    Started without a launcher it is one process. accelerate takes "no GPU" to mean one process unless it is told the
    backend.
    """
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        keep_freed_memory()
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    handlers = [InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl")] if launched else []
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=handlers)
    if on_cpu and accelerator.num_processes > 1:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return Process(accelerator.device, accelerator.process_index, accelerator.num_processes)
