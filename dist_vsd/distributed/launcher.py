"""The launcher of this rank: the precision that it asks for; and when it has gone, the rank saves and ends, as if it were told to."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

LOOK_SECONDS = 1.0
PRECISION_OF_LAUNCHER = {"no": "", "bf16": "bf16", "fp16": "fp16"}


def launchers_precision() -> str:
    """Return the precision that the launcher's mixed_precision asks for: bf16, fp16, or empty where it asks for none.

    Raises:
        ValueError: it is something else.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in PRECISION_OF_LAUNCHER:
        raise ValueError(f"the launcher's mixed_precision must be one of {', '.join(PRECISION_OF_LAUNCHER)}, got {launcher!r}: change it")
    return PRECISION_OF_LAUNCHER[launcher]


def stop_with_launcher() -> None:
    """Send this process SIGTERM when its launcher, killed by SIGKILL say, is no longer its parent; nothing without a launcher.

    Before the run catches the signal it ends the process; from then on it means: save and stop. The kernel's own way
    (PR_SET_PDEATHSIG) tells of the end of the thread that started this process, and a launcher that starts its ranks from a thread
    may live on; the parent's number changes when the whole launcher is gone, and not before.
    """
    if not _has_launcher():
        return
    parent = os.getppid()
    if parent == 1 and not _is_python(parent):  # gone while this process loaded its libraries
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _has_launcher() -> bool:
    """Say whether the parent is a launcher. accelerate starts a single rank by itself, and others through torchrun."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    with contextlib.suppress(OSError):
        return "ACCELERATE_MIXED_PRECISION" in os.environ and b"accelerate" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    return False


def _is_python(process: int) -> bool:
    """Say whether a process is Python, as launchers are: in a container they may be process 1."""
    try:
        return "python" in os.readlink(f"/proc/{process}/exe")
    except OSError:  # another user's
        return False


def _watch(parent: int) -> None:
    never = threading.Event()
    while os.getppid() == parent:
        never.wait(LOOK_SECONDS)
    with contextlib.suppress(OSError):
        os.write(2, b"dist-vsd: the launcher of this rank has gone: saving and stopping\n")
    os.kill(os.getpid(), signal.SIGTERM)
