"""Which implementation of a kernel serves a device: the choice is made here alone, and can be said in a line."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os

import torch
from torch import Tensor

VARIABLE = "DIST_VSD_KERNELS"
IMPLEMENTATIONS = ("triton", "torch")


@functools.cache
def has_triton() -> bool:
    """Say whether triton is installed, without importing it; torch's builds for CUDA bring it."""
    return importlib.util.find_spec("triton") is not None


def implementation(device: torch.device) -> str:
    """Return which implementation serves a device.

    ``triton`` on CUDA where triton is installed, ``torch`` elsewhere; the environment variable DIST_VSD_KERNELS has the last word. Asked
    for on a CPU, Triton's kernels run in its interpreter: right numbers, very slowly.

    Raises:
        ValueError: the variable asks for what there is not.
    """
    asked = os.environ.get(VARIABLE) or ("triton" if device.type == "cuda" and has_triton() else "torch")
    if asked not in IMPLEMENTATIONS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(IMPLEMENTATIONS)}, got {asked!r}: change it, or unset it")
    if asked == "triton" and not has_triton():
        raise ValueError(f"{VARIABLE}=triton needs triton, which is not installed: pip install triton, or unset {VARIABLE}")
    if asked == "triton" and device.type not in ("cuda", "cpu"):
        raise ValueError(f"{VARIABLE}=triton serves CUDA, and CPUs in Triton's interpreter, got {device}: unset {VARIABLE}")
    return asked


def serves(*tensors: Tensor) -> bool:
    """Say whether Triton's kernels serve these tensors: they compute in fp32; what comes in another precision goes to plain torch."""
    return all(tensor.dtype == torch.float32 for tensor in tensors) and implementation(tensors[0].device) == "triton"


def kernels_in_words(device: torch.device) -> str:
    """Return in a few words what serves a device, and why where that is not plain."""
    asked = f" ({VARIABLE}={os.environ[VARIABLE]})" if os.environ.get(VARIABLE) else ""
    if implementation(device) == "triton":
        where = "" if device.type == "cuda" else ", in its interpreter"
        return f"Triton {importlib.metadata.version('triton')}{where}{asked}"
    return "plain torch" + (asked or (", as triton is not installed" if device.type == "cuda" else ""))
