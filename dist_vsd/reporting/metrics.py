"""What a run reports while it goes: metrics.jsonl, and progress on the terminal; wandb follows metrics.jsonl (wandb_reporter.py).

Names are ``area/name_unit``. Of the last update: theta/score_gradient_norm (of w(t) times the difference of the scores),
theta/gradient_norm (of theta), theta/opacity (mean over pixels), theta/skipped (share of steps skipped as not finite), phi/loss
(mean denoising loss over all renders of all ranks), phi/gradient_norm (of the sum over ranks), seconds/<stage> (on one rank:
render, scores, backward, phi), seconds/update, communication/sent_mib (payload that a rank sends), memory/peak_mib (of the rank
that has used most so far), speed/all_reduce_share (of the update's seconds, in collectives or waiting in them for other ranks;
not under ZeRO, whose library hides it). Since the last line: score/gap_t<low>-<high> (the norm of eps_pretrain - eps_phi, mean over
renders with t / T in that band), speed/updates_per_second. Every preview_every updates, where a CLIP lies beside the prior: clip/score,
clip/r_precision, particles/diversity and more (evaluation/clip_figures.py).
The surrogate whose gradient is the VSD gradient has no meaningful value and is not reported.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class SilentReporter:
    """The reporter of every rank but 0."""

    takes_media = False

    def log(self, update: int, figures: dict[str, float]) -> None:
        """Do nothing."""

    def show(self, update: int, media: dict[str, list[str]]) -> None:
        """Do nothing."""

    def event(self, update: int, text: str) -> None:
        """Do nothing."""

    def advance(self, update: int) -> None:
        """Do nothing."""

    def close(self, exit_code: int = 0) -> None:
        """Do nothing."""


class RankZeroReporter:
    """Writes metrics.jsonl and shows progress: a bar on a terminal, a line every few seconds otherwise.

    Args:
        file: metrics.jsonl; lines of updates after ``first_update`` are dropped, since a resumed run repeats them.
        first_update: updates done already.
        num_updates: of the whole run.
        seconds_between_lines: without a terminal.
    """

    takes_media = False

    def __init__(self, file: Path, first_update: int, num_updates: int, seconds_between_lines: float = 10.0) -> None:
        _drop_later_lines(file, first_update)
        self._file = open(file, "a")  # noqa: SIM115 - closed by close()
        self._num_updates, self._first_update = num_updates, first_update
        self._seconds_between_lines = seconds_between_lines
        self._begin = self._last_line = time.monotonic()
        self._note = ""
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            text, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
            self._bar = Progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note, console=Console())
            self._task = self._bar.add_task("updates", total=num_updates, completed=first_update, note="")
            self._bar.start()

    def log(self, update: int, figures: dict[str, float]) -> None:
        """Append a line to metrics.jsonl; numbers that JSON can't hold become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self._write({"update": update, **finite})
        if "phi/loss" in figures:
            self._note = f"phi loss {figures['phi/loss']:.3f}"

    def show(self, update: int, media: dict[str, list[str]]) -> None:
        """Append a line that names the files."""
        self._write({"update": update, "media": media})

    def event(self, update: int, text: str) -> None:
        """Append an event to metrics.jsonl and print it."""
        self._write({"update": update, "event": text})
        if self._bar:
            self._bar.console.print(f"update {update}: {text}")
        else:
            print(f"update {update}: {text}", flush=True)

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def advance(self, update: int) -> None:
        """Move the bar, or print a line if the last one is old enough."""
        if self._bar:
            self._bar.update(self._task, completed=update, note=self._note)
            return
        now = time.monotonic()
        if now - self._last_line >= self._seconds_between_lines or update == self._num_updates:
            self._last_line = now
            rate = (now - self._begin) / max(1, update - self._first_update)
            left = rate * (self._num_updates - update)
            print(f"update {update}/{self._num_updates}  {rate:.2f} s each  {left:.0f} s left  {self._note}", flush=True)

    def close(self, exit_code: int = 0) -> None:
        """Close the file and take the bar down."""
        if self._bar:
            self._bar.stop()
        self._file.close()


def _drop_later_lines(file: Path, first_update: int) -> None:
    """Keep the whole lines of updates up to ``first_update``; a line that was cut off by a crash is dropped too."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["update"] <= first_update:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(file)
