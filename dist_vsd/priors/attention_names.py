"""The back ends of attention by name, and whether they are there. Apart from attention.py: to be named without torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

ATTENTIONS = ("sdpa", "xformers", "flash")
HALF = ("bf16", "fp16")


def why_not(attention: str, precision: str) -> str:
    """Say why a back end can't be used here, or nothing if it can: on a GPU it is tried.

    Args:
        attention: one of ATTENTIONS.
        precision: of the frozen networks; empty is fp32.
    """
    if attention == "sdpa":
        return ""
    if attention == "xformers" and importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install 'dist_vsd[xformers]')"
    import torch

    if not torch.cuda.is_available():
        return "its kernels want a GPU, and there is none here"
    if attention == "flash" and precision not in HALF:
        return "its kernels compute in bf16 or fp16, not in fp32 (--precision bf16)"
    from dist_vsd.priors.attention import ATTEND

    place, dtype = f"cuda:{os.environ.get('LOCAL_RANK', '0')}", torch.float16 if precision == "fp16" else torch.bfloat16
    try:
        ATTEND[attention](*[torch.zeros(1, 16, 2, 64, device=place, dtype=dtype)] * 3)
    except (ImportError, OSError, RuntimeError, NotImplementedError, ValueError) as error:
        return f"its kernels don't run here ({' '.join(str(error).split())[:100] or type(error).__name__})"
    return ""


def require_attention(attention: str, precision: str, choices: Sequence[str] = ATTENTIONS) -> None:
    """Refuse a back end that is not there; ValueError in one line.

    Args:
        attention: one of ATTENTIONS.
        precision: see why_not.
        choices: that the prior has.
    """
    if attention not in choices:
        raise ValueError(f"attention must be {' or '.join(choices)} for this prior, got {attention!r}: change --attention")
    reason = why_not(attention, precision)
    if reason:
        raise ValueError(f"attention {attention!r} can't be used: {reason}; leave --attention out for sdpa, torch's own")
