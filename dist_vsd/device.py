"""What is asked of an accelerator beside tensors: which one, waiting for it, its peak memory, and copies beside its work.

The one place that knows of streams, events and pinned memory. Another kind of accelerator than CUDA serves as far as its module of
torch (``torch.get_device_module``) has the same names. On a CPU everything is done when it returns, and all of this does nothing.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Name = TypeVar("Name", bound=Hashable)
ALIGNMENT = 16  # bytes: of every type of numbers
CUBLAS_VARIABLE, CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"  # the other that torch takes, :16:8, may be slower


def best_device() -> torch.device:
    """Return where a command of one process computes: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def use_fixed_order() -> None:
    """Have this process compute everything in a fixed order from now on: the same bits from the same input on the same machine.

    torch refuses matrix products on CUDA in this mode unless cuBLAS is told which workspaces to keep, by a variable that cuBLAS reads at
    its first use; a value of the user's own is left (https://docs.nvidia.com/cuda/cublas/#results-reproducibility).
    """
    os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(True)


def use_full_fp32() -> None:
    """Have fp32 be fp32 on a GPU: torch lets cuDNN round what convolutions multiply to TF32, with 10 bits, unless it is told not to."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def is_accelerator(device: torch.device) -> bool:
    """Say whether a device works beside the CPU, which then has to wait for its results."""
    return device.type not in ("cpu", "meta")


def synchronize(device: torch.device) -> None:
    """Wait until all that a device was given is done."""
    if is_accelerator(device):
        torch.get_device_module(device).synchronize()  # CPU-GPU sync


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory so far: allocated on the accelerator, or resident in main memory on a CPU."""
    if is_accelerator(device):
        return torch.get_device_module(device).max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    rows = status.read_text().splitlines() if status.exists() else []
    peaks = [int(row.split()[1]) for row in rows if row.startswith("VmHWM:")]
    return (peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**10


def reset_peak_memory(device: torch.device) -> None:
    """Begin the peak of peak_memory_mib anew; of main memory where the system can (Linux)."""
    if is_accelerator(device):
        torch.get_device_module(device).reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def brought_together(tensors: Mapping[Name, Tensor], device: torch.device) -> dict[Name, Tensor]:
    """Bring tensors of the host to a device in one copy, from pinned memory; on a CPU they are returned as they are.

    Args:
        tensors: by name, of any shapes and types.
        device: to bring them to.

    Returns:
        The same tensors there, views of one block of memory.
    """
    if not is_accelerator(device):
        return {name: tensor.to(device) for name, tensor in tensors.items()}  # of the meta device: shapes alone
    places, end = {}, 0
    for name, tensor in tensors.items():
        places[name], end = end, end + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    freight = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    for name, tensor in tensors.items():
        _part(freight, places[name], tensor).copy_(tensor)
    arrived = freight.to(device, non_blocking=True)  # the allocator of pinned memory keeps its block until the copy is done
    return {name: _part(arrived, places[name], tensor) for name, tensor in tensors.items()}


def _part(block: Tensor, first: int, like: Tensor) -> Tensor:
    """Return the part of a block of bytes that holds a tensor."""
    return block[first : first + like.nbytes].view(like.dtype).view(like.shape)


def read_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Bring tensors of numbers to the host in one copy, for which the host waits once (a CPU-GPU sync).

    Args:
        tensors: of one device, of any shapes and types; read as fp64.

    Returns:
        The same numbers on the CPU, fp64.
    """
    if not tensors:
        return []
    numbers = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors]).cpu()
    return [part.view(tensor.shape) for part, tensor in zip(numbers.split([t.numel() for t in tensors]), tensors, strict=True)]


def time_mark(device: torch.device) -> Any:
    """Mark a moment of the device's work, without waiting for it; see ``seconds_between``."""
    if not is_accelerator(device):
        return time.perf_counter()
    module = torch.get_device_module(device)
    mark = module.Event(enable_timing=True)
    mark.record(module.current_stream(device))
    return mark


def seconds_between(begin: Any, end: Any) -> float:
    """Return the seconds between two marks of one device, which must have come to the second (a CPU-GPU sync, if it has not)."""
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000.0


class SideStream:
    """A queue of copies between host and device that go on beside the computation, which has a queue of its own.

    Args:
        device: whose; on a CPU copies are done when they return.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device) if is_accelerator(device) else None
        self._stream: Any = self._module.Stream(device) if self._module is not None else None
        self._computation: Any = None  # the queue that was current when queued() began

    @contextlib.contextmanager
    def queued(self) -> Iterator[None]:
        """Let copies inside the ``with`` go into this queue."""
        if self._module is None:
            yield
            return
        self._computation = self._module.current_stream(self._device)
        with self._module.stream(self._stream):
            yield

    def wait_for_computation(self) -> None:
        """Let what is queued here from now on wait for what the computation has been given so far."""
        if self._module is not None:
            self._stream.wait_stream(self._module.current_stream(self._device))

    def mark(self) -> Any:
        """Return a mark of what has been queued here so far, for ``let_computation_wait``."""
        return self._stream.record_event() if self._module is not None else None

    def let_computation_wait(self, mark: Any) -> None:
        """Let what the computation is given from now on wait for a mark."""
        if self._module is not None and mark is not None:
            self._module.current_stream(self._device).wait_event(mark)

    def brought(self, tensor: Tensor) -> Tensor:
        """Queue, inside queued(), a copy of a host's tensor to the device, whose memory is kept until the computation is done with it."""
        copy = tensor.to(self._device, non_blocking=True, copy=True)
        if self._computation is not None:
            copy.record_stream(self._computation)
        return copy

    def take_home(self, tensor: Tensor, home: Tensor) -> None:
        """Queue, inside queued(), a copy of a tensor into the host's memory; the tensor's own is kept until it is done."""
        home.copy_(tensor, non_blocking=True)
        if self._module is not None and is_accelerator(tensor.device):
            tensor.record_stream(self._stream)

    def home_for(self, tensor: Tensor) -> Tensor:
        """Return host memory, pinned where copies are queued, for a tensor."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._module is not None)

    def synchronize(self) -> None:
        """Wait until all that was queued here is done."""
        if self._module is not None:
            self._stream.synchronize()  # CPU-GPU sync
