"""Launching a kernel of Triton: on the GPU that holds its tensors, or on the CPU in Triton's interpreter.

Imported by the files of kernels alone, so that the package imports without triton.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

# Without fused multiply-adds a kernel rounds as plain torch does, so that a point on the border of two cells is in the same one in both.
OPTIONS = {"enable_fp_fusion": False}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, **constants: int) -> None:
    """Start a kernel.

    Args:
        kernel: what ``triton.jit`` made.
        grid: programs along each axis; with none of them nothing is started.
        arguments: in the kernel's order; the first is a tensor, whose device runs it.
        num_warps: of a program.
        constants: the kernel's constants of compilation, by name.
    """
    if 0 in grid:
        return
    first: Tensor = arguments[0]
    if first.is_cuda:
        with torch.cuda.device(first.device):
            kernel[grid](*arguments, **constants, num_warps=num_warps, **OPTIONS)
        return
    if first.is_meta:
        return  # shapes alone: what a kernel is given and fills is there
    with _interpreted_globals(kernel.fn):
        _interpreted(kernel)[grid](*arguments, **constants)


@functools.cache
def _interpreted(kernel: Any) -> InterpretedFunction:
    """Return a kernel for the interpreter, whether or not TRITON_INTERPRET was set when triton was imported."""
    return kernel if isinstance(kernel, InterpretedFunction) else InterpretedFunction(kernel.fn)


@contextlib.contextmanager
def _interpreted_globals(function: Callable) -> Iterator[None]:
    """Inside, let functions of the compiler that a kernel calls be Python's: its file's helpers, and Triton's sums over blocks."""
    names = function.__globals__
    helpers = {name: value for name, value in names.items() if isinstance(value, JITFunction)}
    reductions = {name: getattr(tl, name) for name in _REDUCTIONS if isinstance(getattr(tl, name), JITFunction)}
    names.update({name: _interpreted(helper).rewrite() for name, helper in helpers.items()})
    for name in reductions:
        setattr(tl, name, _REDUCTIONS[name])
    try:
        yield
    finally:
        names.update(helpers)
        for name, value in reductions.items():
            setattr(tl, name, value)


def _sum(block: Any, axis: int) -> Any:
    return tl.reduce(block, axis, tl.standard._sum_combine)


def _max(block: Any, axis: int) -> Any:
    return tl.reduce(block, axis, tl.standard._elementwise_max)


def _cumsum(block: Any, axis: int = 0, reverse: bool = False) -> Any:
    return tl.associative_scan(block, axis, tl.standard._sum_combine, reverse)


_REDUCTIONS = {"sum": _sum, "max": _max, "cumsum": _cumsum}
