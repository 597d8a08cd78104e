"""Passes through a frozen network as CUDA graphs: recorded once for each shape and launched whole, so that nobody waits for Python.

A pass at Stable Diffusion's size is some thousand kernels of microseconds each, which a CPU hands to the GPU one by one. Only passes
without a gradient are recorded: those of eps_pretrain and of phi's score. phi's training pass, whose gradients accumulate over
micro-batches and travel by DDP's hooks, is compiled by region alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Before it is recorded a pass is made so often beside it: compilers and libraries choose their kernels, and take their workspaces.
NUM_WARMUP = 3


@dataclasses.dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor | None, ...]
    output: Tensor


class Graphed:
    """A function of tensors, called as it is where a gradient is wanted, and launched as a CUDA graph where none is.

    Args:
        function: of tensors on one GPU (or None in place of one) to a tensor. It must call the same kernels whatever the tensors' numbers,
            on weights that stay where they are and may change their values; it neither waits nor copies from the host.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._recorded: dict[tuple[Any, ...], _Recorded] = {}
        self._pool: Any = None  # the graphs' memory: they run one after the other, and results are copied out

    def __call__(self, *tensors: Tensor | None) -> Tensor:
        """Return what the function returns."""
        given = [tensor for tensor in tensors if tensor is not None]
        if torch.is_grad_enabled() or not all(tensor.is_cuda for tensor in given):
            return self._function(*tensors)
        key = tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors)
        if key not in self._recorded:
            self._recorded[key] = self._record(tensors)
        recorded = self._recorded[key]
        for own, tensor in zip(recorded.inputs, tensors, strict=True):
            if own is not None and tensor is not None:
                own.copy_(tensor)
        recorded.graph.replay()
        return recorded.output.clone()

    def _record(self, tensors: tuple[Tensor | None, ...]) -> _Recorded:
        inputs = tuple(None if tensor is None else tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors)
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(NUM_WARMUP):
                self._function(*inputs)
        torch.cuda.current_stream().wait_stream(beside)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # NCCL's watchdog asks for events
            output = self._function(*inputs)
        return _Recorded(graph, inputs, output)
