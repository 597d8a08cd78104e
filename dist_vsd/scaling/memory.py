"""The memory that this process may take, and what becomes of an error when it is at its end."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

from dist_vsd.errors import OutOfMemory, is_out_of_memory

KEPT_FREE = 0.05  # of the free memory: libraries take some for themselves
MIB, GIB = 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
    """What there is for one process.

    Attributes:
        total: bytes that it could have if nothing else were there.
        free: bytes that it may still take.
        where: in words.
        held: bytes of main memory that it has as data already; 0 for a GPU's memory.
    """

    total: int
    free: int
    where: str
    held: int = 0

    @staticmethod
    def of(device: torch.device | str) -> Memory:
        """Ask for the memory of a GPU; or for main memory as far as the system, the job's cgroup and ulimit give it, a share for each rank.

        Args:
            device: of this process.
        """
        device = torch.device(device)
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            return Memory(total, free, f"GPU {device.index or 0}")
        machine, num_ranks = psutil.virtual_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        pairs = [(machine.total, machine.available), *cgroup_limits()]
        pairs = [(total // num_ranks, free // num_ranks) for total, free in pairs]
        own = psutil.Process().memory_info()
        address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
        if address_space != resource.RLIM_INFINITY:
            pairs.append((address_space, address_space - own.vms))
        free = max(0, min(free for _, free in pairs))
        return Memory(min(total for total, _ in pairs), free, "main memory", getattr(own, "data", 0))


def cgroup_limits(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[tuple[int, int]]:
    """Return (limit, what is left of it), bytes, for each control group with a limit that this process is in, as Slurm makes them.

    Args:
        proc: where the system lists the groups of this process.
        root: under which it shows them, of version 2 or 1.
    """
    found = []
    for line in proc.read_text().splitlines() if proc.exists() else []:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            folder, names = root / path.lstrip("/"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            folder, names = root / "memory" / path.lstrip("/"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        for place in (folder, *folder.parents):
            if place == root.parent:
                break
            with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                limit, used = (int((place / name).read_text()) for name in names)
                found.append((limit, limit - used))
    return found


@contextlib.contextmanager
def telling_out_of_memory(memory: Memory, advice: Callable[[Memory], str]) -> Iterator[None]:
    """Turn an error for want of memory inside the ``with`` into OutOfMemory, one line that says what would fit.

    In main memory the process is kept to what was free: Linux promises more than it has, and kills without a word who takes it.

    Args:
        memory: that the work is in, as it was before the work took any.
        advice: what would fit into it, in words; called when what the block held is free again.

    Raises:
        OutOfMemory: see above.
    """
    told = ""
    with _kept_to(memory):
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            told = asked_for(error)
            _free_frames(error)
    if told:
        who = f"rank {os.environ['RANK']} ran out of memory" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "out of memory"
        raise OutOfMemory(f"{who} ({told}; {in_words(memory.free)} of {memory.where} were free): {_without_failing(advice, memory)}")


@contextlib.contextmanager
def _kept_to(memory: Memory) -> Iterator[None]:
    """Let the system refuse what this process takes beyond the memory that was free (Linux; a GPU refuses by itself)."""
    if not memory.held or sys.platform != "linux":
        yield
        return
    soft, hard = before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = memory.held + int((1 - KEPT_FREE) * memory.free)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def asked_for(error: BaseException) -> str:
    """Return the library's own words about what it asked for, short."""
    text = " ".join(str(error).split())
    for sign in ("tried to allocate", "Tried to allocate", "Unable to allocate"):
        _, found, rest = text.partition(sign)
        number, _, unit = rest.strip().partition(" ")
        if found and number.replace(".", "").isdigit():
            unit = unit.partition(" ")[0].rstrip(".,")
            size = in_words(int(number)) if unit == "bytes" else f"{number} {unit}"
            return f"asked for {size} at once"
    return type(error).__name__


def _free_frames(error: BaseException | None) -> None:
    """Let go of what the functions that failed held."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _without_failing(advice: Callable[[Memory], str], memory: Memory) -> str:
    """Ask for advice, which may itself find too little memory."""
    try:
        return advice(memory)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return "give it more memory, or ask for less at once"


def in_words(num_bytes: float) -> str:
    """Write a number of bytes for a reader: "0.3 GiB", "1,234 GiB", "12 MiB"."""
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / MIB:,.0f} MiB"
