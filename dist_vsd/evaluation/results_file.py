"""Evaluations on disk: evaluation.json in each run's directory, and a table of all as CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from dist_vsd.evaluation.evaluation import Evaluation
from dist_vsd.evaluation.metric_names import EVALUATION_FILE, METRICS
from dist_vsd.runs.run_directory import split_stage
from dist_vsd.runs.saved_run import SavedRun

COLUMNS = ("run_dir", "prompt", "objective", "representation", "seed", "update", "num_particles")


def evaluation_file(path: Path) -> Path:
    """Return where figures of a run directory, or of RUN_DIR@STAGE, are written: evaluation.json, or evaluation_STAGE.json."""
    directory, stage = split_stage(path)
    return directory / (f"evaluation_{stage}.json" if stage else EVALUATION_FILE)


def record_of(path: Path, saved: SavedRun, found: Evaluation, settings: dict[str, Any]) -> dict[str, Any]:
    """Return everything about one run as plain values.

    Args:
        path: by which the run was named.
        saved: the run.
        found: what its evaluation found.
        settings: how it was evaluated.
    """
    config = saved.config
    facts = (str(path), config.prompt, config.objective, config.representation, config.seed, saved.update, len(saved.particles))
    return {
        **dict(zip(COLUMNS, facts, strict=True)),
        "figures": found.figures,
        "by_particle": found.by_particle,
        "predictions": found.predictions(),
        "settings": settings,
    }


def write_text(text: str, file: Path) -> None:
    """Write a file so that it holds either its old or its whole new content."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def write_record(record: dict[str, Any], path: Path) -> Path:
    """Write the figures of a run, or of a stage of it, into its directory; return the file."""
    write_text(json.dumps(record, indent=1) + "\n", evaluation_file(path))
    return evaluation_file(path)


def names_of(records: list[dict[str, Any]]) -> list[str]:
    """Return the figures that any of the runs has, in the order of METRICS."""
    return [name for names in METRICS.values() for name in names if any(name in record["figures"] for record in records)]


def means_of(records: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean of each figure over the runs that have it."""
    values = {name: [r["figures"][name] for r in records if name in r["figures"]] for name in names_of(records)}
    return {name: sum(found) / len(found) for name, found in values.items()}


def write_all(records: list[dict[str, Any]], file: Path) -> None:
    """Write the evaluations of all runs: a table if the file ends in .csv, else JSON with their means."""
    if file.suffix == ".csv":
        write_text(to_csv(records), file)
    else:
        write_text(json.dumps({"runs": records, "means": means_of(records)}, indent=1) + "\n", file)


def to_csv(records: list[dict[str, Any]]) -> str:
    """Return a table with a row for each run."""
    names, text = names_of(records), io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*COLUMNS, *names])
    for record in records:
        rows.writerow([*(_cell(record[name]) for name in COLUMNS), *(record["figures"].get(name) for name in names)])
    return text.getvalue()


def _cell(value: Any) -> Any:
    """Return a cell's value; text that a spreadsheet would take for a formula gets an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else value
