"""Which implementation of a kernel serves a device: the choice is made here alone, and can be said in a line."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dist_vsd.kernels import c_kernels

VARIABLE = "DIST_VSD_KERNELS"
IMPLEMENTATIONS = ("triton", "c", "torch")


@functools.cache
def has_triton() -> bool:
    """Say whether triton is installed, without importing it; torch's builds for CUDA bring it."""
    return importlib.util.find_spec("triton") is not None


def lacking(device: torch.device) -> str:
    """Return what Triton's kernels lack to serve a device, with the remedy; nothing where they lack nothing.

    At its first launch on a machine Triton compiles a few lines of C against Python's headers, with the machine's own compiler. Where
    that is not to be had plain torch serves, and the first render does not fail.
    """
    if device.type not in ("cuda", "cpu", "meta"):
        return f"triton serves CUDA, and CPUs in its interpreter, not {device}"
    if not has_triton():
        return "triton is not installed: pip install triton"
    return _lacking_to_compile() if device.type == "cuda" else ""


@functools.cache
def _lacking_to_compile() -> str:
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton finds no C compiler: install gcc"
    return lacking_headers()


def lacking_headers() -> str:
    """Return what is lacking to compile against Python's headers, as Triton and torch's own compiler do; nothing where they are there."""
    scheme = sysconfig.get_default_scheme()
    headers = Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"])
    return "" if (headers / "Python.h").exists() else f"there is no Python.h in {headers}: install python3-dev"


def implementation(device: torch.device) -> str:
    """Return which implementation serves a device.

    ``triton`` on CUDA and ``c`` on a CPU, where they lack nothing, ``torch`` elsewhere; the environment variable DIST_VSD_KERNELS has the
    last word. Asked for on a CPU, Triton's kernels run in its interpreter: right numbers, very slowly. The meta device stands for a GPU:
    nothing is computed.

    Raises:
        ValueError: the variable asks for what there is not.
    """
    asked = os.environ.get(VARIABLE) or _best(device)
    if asked not in IMPLEMENTATIONS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(IMPLEMENTATIONS)}, got {asked!r}: change it, or unset it")
    if asked == "triton" and lacking(device):
        raise ValueError(f"{VARIABLE}=triton can not be had: {lacking(device)}; or unset {VARIABLE}")
    if asked == "c" and lacking_c(device):
        raise ValueError(f"{VARIABLE}=c can not be had: {lacking_c(device)}; or unset {VARIABLE}")
    return asked


def _best(device: torch.device) -> str:
    if device.type == "cpu":
        return "torch" if lacking_c(device) else "c"
    return "triton" if device.type in ("cuda", "meta") and not lacking(device) else "torch"


def lacking_c(device: torch.device) -> str:
    """Return what kernels in C lack to serve a device, with the remedy; nothing where they lack nothing. They are compiled for it."""
    if device.type != "cpu":
        return f"kernels in C serve CPUs, not {device}"
    return c_kernels.lacking()


@contextlib.contextmanager
def served_by(kernels: str) -> Iterator[None]:
    """Let one implementation, of IMPLEMENTATIONS, serve inside: for comparing them."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = kernels
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def serving(*tensors: Tensor) -> str:
    """Return which of IMPLEMENTATIONS serves these tensors: kernels compute in fp32, plain torch in every precision."""
    return implementation(tensors[0].device) if all(tensor.dtype == torch.float32 for tensor in tensors) else "torch"


def kernels_in_words(device: torch.device) -> str:
    """Return in a few words what serves a device, and why where that is not plain."""
    asked = f" ({VARIABLE}={os.environ[VARIABLE]})" if os.environ.get(VARIABLE) else ""
    if implementation(device) == "triton":
        where = "" if device.type == "cuda" else ", in its interpreter"
        return f"Triton {importlib.metadata.version('triton')}{where}{asked}"
    if implementation(device) == "c":
        return f"kernels in C{asked}"
    lacks = {"cuda": lacking, "cpu": lacking_c}.get(device.type)
    return "plain torch" + (asked or (f", as {lacks(device)}" if lacks else ""))
