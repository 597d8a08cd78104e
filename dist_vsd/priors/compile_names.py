"""The ways of compiling a prior's networks by name, and whether they are there. Apart from compiled.py: to be named without torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

COMPILES = ("off", "regions", "graphs")


def why_not_compiled(way: str) -> str:
    """Say why a way of compiling can't be had here, or nothing if it can.

    Args:
        way: one of COMPILES.
    """
    if way == "off":
        return ""
    import torch

    from dist_vsd.kernels.choice import lacking, lacking_headers

    if torch.cuda.is_available():
        return lacking(torch.device("cuda"))
    if way == "graphs":
        return "CUDA graphs want a GPU, and there is none here"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"torch finds no C++ compiler ({compiler}): install g++, or name one in CXX"
    return lacking_headers()


def require_compile(way: str, deterministic: bool, choices: Sequence[str] = COMPILES) -> None:
    """Refuse a way of compiling that is not there; ValueError in one line.

    Args:
        way: one of COMPILES.
        deterministic: whether the run promises the same bits.
        choices: that the prior has.
    """
    if way not in choices:
        raise ValueError(f"compile must be {' or '.join(choices)} for this prior, got {way!r}: change --compile")
    reason = why_not_compiled(way)
    if not reason and deterministic and way != "off":
        reason = _why_not_the_same_bits()
    if reason:
        raise ValueError(f"compile {way!r} can't be used: {reason}; leave --compile out for off")


def _why_not_the_same_bits() -> str:
    import torch

    if not torch.cuda.is_available():
        return ""
    return "on a GPU the compiler chooses among kernels by trial, which sum in other orders, and --deterministic promises the same bits"
