"""How much memory an update holds at most, counted while it runs: every block from its making to its end, by stages.

On the meta device (scaling/counted_work.py: shapes_alone) this takes seconds on any machine, at any size.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_vsd.training.stopwatch import Stopwatch

BLOCK_BYTES = 512  # of CUDA's caching allocator: what is asked for is rounded up to it


class CountedMemory(TorchDispatchMode):
    """Inside it, the memory of tensors that are made on a device is counted until it is given back.

    Not counted: what libraries take for themselves (a CUDA context, workspaces of convolutions and matrix products) and what lies idle
    between blocks.

    Args:
        device: whose memory.

    Attributes:
        live_bytes: now.
        peak_bytes: the most so far; ``forget_peak`` begins anew.
        peak_stage: of the update in which that was.
        peaks: the most in each stage.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device_type = device.type
        self._known: set[int] = set()
        self.live_bytes = 0
        self.forget_peak()

    def forget_peak(self) -> None:
        """Count the most from now on."""
        self.peak_bytes, self.peak_stage, self.peaks = self.live_bytes, "before", {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Carry an operation out and count what it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self._device_type:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        self._known.add(storage._cdata)
        self.live_bytes += size
        weakref.finalize(storage, self._give_back, storage._cdata, size)
        stage = Stopwatch.current()
        self.peaks[stage] = max(self.peaks.get(stage, 0), self.live_bytes)
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_stage = self.live_bytes, stage

    def _give_back(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live_bytes -= size
