"""The results of a sweep: each run's state and last figures, and results.csv.

Runs may be finished, half-way, failed or missing: what a run does not have is left out.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vsd.config_files import load_preset, to_mapping
from dist_vsd.sweep.manifest import PlannedRun, Sweep
from dist_vsd.sweep.overrides import flatten

if TYPE_CHECKING:
    from dist_vsd.sweep.state import RunState

# A spreadsheet takes a cell that begins so for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What is known of one run.

    Attributes:
        run: as planned.
        state: how far it is.
        settings: by dotted name, whatever any run of the sweep overrides, and the objective.
        figures: the last value of each metric.
    """

    run: PlannedRun
    state: RunState
    settings: dict[str, Any]
    figures: dict[str, float]


def collect(sweep: Sweep, states: dict[str, RunState]) -> list[Result]:
    """Return the result of each run of a sweep, in the order of the manifest.

    Args:
        sweep: read from its directory.
        states: of every run, by its id.
    """
    defaults = flatten(to_mapping(load_preset(sweep.settings.preset)))
    names = dict.fromkeys(["objective", *(name for run in sweep.runs for name in run.overrides)])
    shared = {name: defaults.get(name) for name in names}
    return [
        Result(run=run, state=states[run.id], settings=shared | run.overrides, figures=read_figures(sweep.run_dir(run) / "metrics.jsonl"))
        for run in sweep.runs
    ]


def read_figures(file: Path) -> dict[str, float]:
    """Return the last value of each metric of a run; nothing of a line that is cut off or of a value that is not a number."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return {}
    figures: dict[str, float] = {}
    for line in lines:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict):
            figures |= {name: value for name, value in values.items() if name != "update" and _is_number(value)}
    return figures


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def metric_names(results: list[Result]) -> list[str]:
    """Return the metrics that any run has, sorted."""
    return sorted({name for result in results for name in result.figures})


def to_csv(results: list[Result]) -> str:
    """Return results as a table with a row for each run; text that a spreadsheet would take for a formula gets an apostrophe."""
    settings = [name for name in results[0].settings if name != "objective"] if results else []
    metrics = metric_names(results)
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    head = ["id", "prompt", "seed", "objective", "state", "update", "num_updates", "updates_per_second", "error", "tags"]
    rows.writerow(map(_cell, [*head, *settings, *metrics]))
    for result in results:
        run, state = result.run, result.state
        row = [run.id, run.prompt, run.seed, result.settings["objective"], state.state, state.update, state.num_updates]
        row += [state.updates_per_second, state.error, ", ".join(run.tags)]
        row += [result.settings[name] for name in settings] + [result.figures.get(name) for name in metrics]
        rows.writerow(map(_cell, row))
    return text.getvalue()


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    text = value if isinstance(value, str) else json.dumps(value)
    return f"'{text}" if text.startswith(_FORMULA) else text
