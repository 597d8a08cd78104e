"""A sweep's state in words: totals, and a table of the runs that one wants to know of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from rich.table import Table
from rich.text import Text

from dist_vsd.sweep.state import DONE, FAILED, RUNNING, STATES, STOPPED, WAITING, RunState

NUM_ROWS = 40
COLOURS = {WAITING: "", RUNNING: "cyan", STOPPED: "yellow", DONE: "green", FAILED: "red"}
WORDS = {state: state if state != STOPPED else "stopped early" for state in STATES}


def totals(states: Iterable[RunState]) -> dict[str, Any]:
    """Return the number of runs in each state, and what they have left together.

    Returns:
        ``runs``, a count for each state, ``updates_per_second`` of all running ones, and ``seconds_left``, at that speed, of
        all that are not done or failed; None where that is not known.
    """
    states = list(states)
    counts: dict[str, Any] = {"runs": len(states), **dict.fromkeys(STATES, 0)}
    for run in states:
        counts[run.state] += 1
    speed = sum(run.updates_per_second or 0.0 for run in states if run.state == RUNNING)
    unfinished = [run for run in states if run.state in (WAITING, RUNNING, STOPPED)]
    is_known = speed > 0 and all(run.num_updates is not None for run in unfinished)
    left = sum(max(0, (run.num_updates or 0) - run.update) for run in unfinished)
    return {**counts, "updates_per_second": speed or None, "seconds_left": left / speed if is_known else None}


def totals_line(counts: dict[str, Any], num_queued: int | None) -> str:
    """Return the totals as one line.

    Args:
        counts: of ``totals``.
        num_queued: waiting and stopped runs that a submission will start; None if that is not known.
    """
    line = f"{counts['runs']} run(s): " + ", ".join(f"{counts[state]} {WORDS[state]}" for state in STATES)
    if num_queued is not None and counts[WAITING] + counts[STOPPED]:
        line += f"; {num_queued} queued"
    if counts["updates_per_second"]:
        line += f"; {counts['updates_per_second']:.2f} updates/s"
    if counts["seconds_left"] is not None:
        line += f", {duration(counts['seconds_left'])} left at this speed"
    return line


def table(states: Iterable[RunState]) -> tuple[Table, int]:
    """Return a table of the runs to look at, at most NUM_ROWS of them, and how many are left out.

    What failed comes first, then what runs, what was stopped or killed, what is done, and what waits.
    """
    rank = {FAILED: 0, RUNNING: 1, STOPPED: 2, DONE: 4, WAITING: 5}
    ordered = sorted(states, key=lambda run: 3 if run.state == WAITING and run.note else rank[run.state])
    rows = Table("run", "state", "update", "updates/s", "left", "", box=None, pad_edge=False, header_style="bold")
    for run in ordered[:NUM_ROWS]:
        speed, left = run.updates_per_second, run.seconds_left
        rows.add_row(
            Text(run.run.id, overflow="fold"),
            Text(WORDS[run.state], style=COLOURS[run.state]),
            f"{run.update}/{run.num_updates if run.num_updates is not None else '?'}",
            f"{speed:.2f}" if speed else "",
            duration(left) if left is not None else "",
            Text(printable(run.error or run.note), overflow="fold"),  # Text: no markup is read from what a run said
        )
    return rows, max(0, len(ordered) - NUM_ROWS)


def to_json(states: Iterable[RunState]) -> list[dict[str, Any]]:
    """Return the states as plain values: id, prompt, seed, overrides, tags, and what the table shows."""
    plain = []
    for state in states:
        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "run"}
        derived = {"updates_per_second": state.updates_per_second, "seconds_left": state.seconds_left}
        plain.append({"id": state.run.id, **dataclasses.asdict(state.run), **fields, **derived})
    return plain


def duration(seconds: float) -> str:
    """Return seconds in the two units that matter: "45 s", "12 min", "3 h 05 min", "2 d 04 h"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes // 60 % 24:02d} h"


def printable(text: str) -> str:
    """Return a text whose control characters, which a terminal would obey, are question marks."""
    return "".join(character if character.isprintable() else "?" for character in text)
