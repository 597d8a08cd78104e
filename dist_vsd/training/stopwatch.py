"""Seconds by stage of an update."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import ClassVar

import torch

from dist_vsd.device import synchronize


class Stopwatch:
    """Adds up seconds by stage; on a GPU each reading is a CPU-GPU sync, so it reads only when it is asked to."""

    _going_on: ClassVar[list[str]] = []

    def __init__(self, device: torch.device, waits: bool) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device, self._waits = device, waits

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time inside the ``with`` to a stage."""
        begin = self._now()
        self._going_on.append(name)
        try:
            yield
        finally:
            self._going_on.pop()
        self.seconds[name] += self._now() - begin

    @classmethod
    def current(cls) -> str:
        """Return the stage that is going on in this process, for who counts what is done in each; "other" outside of all."""
        return cls._going_on[-1] if cls._going_on else "other"

    def _now(self) -> float:
        if self._waits:
            synchronize(self._device)
        return time.perf_counter()
