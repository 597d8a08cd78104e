"""What the bench commands share: their words before and after "--", progress, and pictures."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BUSY_CORES = 0.1  # more than that by other programs is worth a word


def busy_sentence(others: float) -> str:
    """Say that other programs kept so many cores busy."""
    return f"other programs used {others:.1f} cores meanwhile: these figures are theirs too; measure on a quiet machine"


def split_words(arguments: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Divide the words at the first "--": bench's own, and those for train."""
    if "--" not in arguments:
        return arguments, ()
    at = arguments.index("--")
    return arguments[:at], tuple(arguments[at + 1 :])


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def write(record: dict[str, Any], table: Path, show: Callable[[dict[str, Any]], None], plot: str, picture: Path) -> None:
    """Write what was measured as JSON, show it as a table, and draw it.

    Args:
        record: of all that was measured.
        table: the JSON file.
        show: prints the record.
        plot: function of scaling/plots.py that draws it.
        picture: the file that it draws.
    """
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(json.dumps(record, indent=1) + "\n")
    show(record)
    print(f"table: {table}")
    write_plot(plot, record, picture)


def write_plot(name: str, record: dict[str, Any], file: Path) -> None:
    """Draw the rows by a function of scaling/plots.py, if matplotlib is installed."""
    try:
        plots = importlib.import_module("dist_vsd.scaling.plots")
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        say("no plot: matplotlib is not installed, `pip install dist_vsd[bench]` installs it")
        return
    getattr(plots, name)(record, file)
    print(f"plot:  {file}")
