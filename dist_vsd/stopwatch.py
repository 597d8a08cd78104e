"""Seconds by stage of an update."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from dist_vsd.device import is_accelerator, seconds_between, synchronize, time_mark


class Stopwatch:
    """Adds up seconds by stage; on an accelerator by marks in its queue, so that nothing waits until they are read.

    Args:
        device: of the work.
        measures: whether to mark anything on an accelerator.
    """

    _going_on: ClassVar[list[str]] = []
    _waits: ClassVar[bool] = False

    def __init__(self, device: torch.device, measures: bool) -> None:
        self._device, self._measures = device, measures or not is_accelerator(device)
        self._marks: list[tuple[str, Any, Any]] = []
        self._begin = time_mark(device) if self._measures else None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time inside the ``with`` to a stage."""
        begin = time_mark(self._device) if self._measures else None
        self._going_on.append(name)
        try:
            yield
        finally:
            self._going_on.pop()
        if self._waits:
            synchronize(self._device)  # CPU-GPU sync
        if self._measures:
            self._marks.append((name, begin, time_mark(self._device)))

    @classmethod
    def current(cls) -> str:
        """Return the stage that is going on in this process, for who counts what is done in each; "other" outside of all."""
        return cls._going_on[-1] if cls._going_on else "other"

    def stop(self) -> None:
        """Add the time since the beginning as ``update``."""
        if self._measures:
            self._marks.append(("update", self._begin, time_mark(self._device)))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each stage (a CPU-GPU sync, if the device has not come to its end)."""
        total: dict[str, float] = defaultdict(float)
        for name, begin, end in self._marks:
            total[name] += seconds_between(begin, end)
        return dict(total)


@contextlib.contextmanager
def waiting_at_stages(waits: bool) -> Iterator[None]:
    """Have the host wait for the device at the end of each stage, as other implementations do at many places: for comparisons."""
    before, Stopwatch._waits = Stopwatch._waits, waits
    try:
        yield
    finally:
        Stopwatch._waits = before
