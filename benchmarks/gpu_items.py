"""What `benchmarks/gpu.py` is made of: items of work with a budget of time each, checks with bounds, and how they are run one by one."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dist_vsd.config import RunConfig
from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.errors import is_out_of_memory
from dist_vsd.training.state import TrainingState, build_state

CPU = torch.device("cpu")
PACKAGE = "/dist_vsd/"
PATIENCE = 2.0  # times its budget, after which an item is cut off
SMALL = {
    "render_size": 16,
    "field": {"num_samples": 8, "dense_grid": {"resolutions": [8]}, "hash_grid": {"log2_table_size": 8, "num_levels": 4}},
}  # of a configuration, to see on a CPU that all of it runs


class Skipped(Exception):
    """What an item wants is not here."""


class OutOfTime(Exception):
    """An item took longer than it may."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the items run.

    Attributes:
        device: the GPU, or the CPU in small.
        small: whether everything is as small as it can be, on a CPU, to see that it runs.
    """

    device: torch.device
    small: bool


@dataclasses.dataclass(frozen=True)
class Item:
    """A piece of work whose failure leaves the others alone.

    Attributes:
        part: of the report.
        name: within the part.
        seconds: its budget: it is skipped where less is left, and cut off at PATIENCE times as much.
        work: returns {"figures": by name, "checks": list of ``within``}, either left out where there are none.
        may_not_fit: whether a lack of memory only skips it.
    """

    part: str
    name: str
    seconds: float
    work: Callable[[], dict[str, Any]]
    may_not_fit: bool = False


def within(name: str, found: float, bound: float) -> dict[str, Any]:
    """Return a check: passed if what was found is a number of at most the bound."""
    return {"name": name, "found": found, "bound": bound, "passed": bool(math.isfinite(found) and found <= bound)}


def run_item(item: Item, seconds_left: float) -> dict[str, Any]:
    """Run an item; return its row.

    The row's state is measured, passed, failed (a check's bound), broke (an error, in one line) or skipped (with the reason).
    """
    row: dict[str, Any] = {"part": item.part, "name": item.name, "seconds": 0.0}
    if item.seconds > seconds_left:
        left = f"its {item.seconds:.0f} s are more than the {max(0.0, seconds_left):.0f} s that were left"
        return row | {"state": "skipped", "reason": left}
    begin = time.monotonic()
    try:
        with _limit(min(PATIENCE * item.seconds, seconds_left)):
            found = item.work()
        checks = found.get("checks", [])
        state = "measured" if not checks else "passed" if all(check["passed"] for check in checks) else "failed"
        row |= found | {"state": state}
    except Skipped as error:
        row |= {"state": "skipped", "reason": str(error)}
    except Exception as error:
        too_large = item.may_not_fit and is_out_of_memory(error)
        row |= {"state": "skipped" if too_large else "broke", "reason": in_one_line(error)}
    free_memory()
    return row | {"seconds": round(time.monotonic() - begin, 2)}


def in_one_line(error: BaseException) -> str:
    """Return the kind of an error, the beginning of its words, and the innermost line of the package that it passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if PACKAGE in frame.filename]
    where = f" (dist_vsd/{frames[-1].filename.rpartition(PACKAGE)[2]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"


def free_memory() -> None:
    """Give back what an item held."""
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # after an error of a kernel CUDA answers nothing any more
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in what is inside when its time is over; a call that waits for the GPU is over first."""

    def ring(*_: object) -> None:
        raise OutOfTime(f"cut off after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def configuration(preset: str, settings: dict[str, Any], small: bool) -> RunConfig:
    """Return a preset with settings and two particles, in small if asked."""
    config = merge(load_preset(preset), {"prompt": "a green duck", "num_particles": 2}, "bench-gpu")
    for more in (SMALL if small else {}, settings):
        config = merge(config, more, "bench-gpu")
    return config


def state_of(config: RunConfig, device: torch.device) -> TrainingState:
    """Return the state of a run on one process."""
    return build_state(config, Layout.of(config.num_particles, num_views=config.num_views), device)


def relative_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the norm of the difference of some tensors together, over that of those expected; in fp64 on the CPU."""
    a, b = (torch.cat([tensor.detach().reshape(-1).to(CPU, torch.float64) for tensor in tensors]) for tensors in (found, expected))
    return float((a - b).norm() / b.norm().clamp(min=1e-300))
