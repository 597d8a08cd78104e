"""What the bench commands share: their words before and after "--", progress, and pictures."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def split_words(arguments: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Divide the words at the first "--": bench's own, and those for train."""
    if "--" not in arguments:
        return arguments, ()
    at = arguments.index("--")
    return arguments[:at], tuple(arguments[at + 1 :])


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


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
