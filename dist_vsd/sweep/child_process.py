"""Processes that are started for a run: they stop with who started them, and signals reach the ranks themselves."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import IO

PR_SET_PDEATHSIG = 1


class StopSignals:
    """The signals to stop that this process has got so far."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def install(self) -> StopSignals:
        """Catch them from now on."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, _frame: self.received.append(number))
        return self


class PassedOn:
    """Passes signals on to processes, each signal once to each process, also to those that come later."""

    def __init__(self) -> None:
        self._sent: set[tuple[int, int]] = set()

    def send(self, signals: list[int], processes: list[int]) -> None:
        """Send what has not been sent.

        Args:
            signals: received so far; the list only grows.
            processes: their ids.
        """
        for process in processes:
            for position, number in enumerate(signals):
                if (process, position) in self._sent:
                    continue
                self._sent.add((process, position))
                with contextlib.suppress(ProcessLookupError):
                    # USR1 would be ignored by a rank that has not got as far as catching it; TERM means the same to it.
                    os.kill(process, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def start(command: list[str], log: IO[bytes], environment: Mapping[str, str], ignores_usr1: bool = False) -> subprocess.Popen:
    """Start a process that gets SIGTERM if this one is killed, in a session of its own, where a terminal's Ctrl-C does not reach it.

    Args:
        command: an argument list.
        log: takes its output.
        environment: all of it.
        ignores_usr1: for launchers, which it would end; the ranks catch it for themselves.
    """
    prctl = ctypes.CDLL(None).prctl  # Linux; looked up here, since little may be done between fork and exec

    def in_child() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if ignores_usr1:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    pipes = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=in_child, **pipes)


def ranks_of(launcher: int) -> list[int]:
    """Return the process ids of the ranks that a launcher has started so far."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            is_rank = int(parent) == launcher and any(v.startswith(b"RANK=") for v in (entry / "environ").read_bytes().split(b"\0"))
        except OSError:  # it has ended
            continue
        if is_rank:
            found.append(int(entry.name))
    return found
