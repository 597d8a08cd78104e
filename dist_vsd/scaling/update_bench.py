"""Timing and counting one update of a configuration on this machine, or counting it alone on shapes."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from dist_vsd.config import RunConfig
from dist_vsd.device import peak_memory_mib, reset_peak_memory, synchronize
from dist_vsd.distributed.layout import Layout
from dist_vsd.priors.compiled import compilations
from dist_vsd.scaling.counted_work import CountedWork
from dist_vsd.scaling.peaks import Peaks
from dist_vsd.scaling.shapes import shapes_alone
from dist_vsd.stopwatch import waiting_at_stages
from dist_vsd.training.state import TrainingState, build_state
from dist_vsd.training.update import update

STAGES = ("render", "scores", "backward", "phi")
META = torch.device("meta")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """A way to make an update.

    Attributes:
        name: in tables.
        config: of the run.
        waits: whether the CPU waits for the device after every stage.
        change: what is done to the state before its first update.
        notes: what the name does not say, a sentence each.
    """

    name: str
    config: RunConfig
    waits: bool = False
    change: Callable[[TrainingState], None] = lambda _state: None
    notes: tuple[str, ...] = ()

    @property
    def particles_per_update(self) -> int:
        """How many particles take a step in an update."""
        return self.config.particles.theta_batch or self.config.num_particles


def measure_way(way: Way, device: torch.device, num_updates: int, num_warmup: int, peaks: Peaks) -> dict[str, Any]:
    """Time and count updates; return a row of the table.

    Updates are timed without waits of ours but the one at the end of each; then as many again with a wait after each stage, which tells
    where the time goes; then one is counted, which slows it down.

    Args:
        way: to make an update.
        device: of this machine.
        num_updates: that count.
        num_warmup: before them: allocators, caches, kernels that are chosen by trial.
        peaks: of the device.
    """
    gc.collect()
    reset_peak_memory(device)
    state = _state(way, device)
    seconds, index, before = [], 0, dataclasses.replace(compilations)
    for index in range(num_warmup + num_updates):
        synchronize(device)
        begin = time.perf_counter()
        with waiting_at_stages(way.waits):
            update(state, index)
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    peak = peak_memory_mib(device)
    by_stage = [update(state, index + 1 + more, measure=True).stopwatch.seconds() for more in range(num_updates)]
    with CountedWork() as work:
        update(state, index + 1 + num_updates)
    median = statistics.median(seconds[num_warmup:])
    flop, num_bytes = sum(work.flop.values()), sum(work.bytes.values())
    return _row(way, work) | {
        "seconds_per_update": median,
        "fastest_and_slowest": [min(seconds[num_warmup:]), max(seconds[num_warmup:])],
        "particle_updates_per_second": way.particles_per_update / median,
        "stage_ms": {stage: 1e3 * statistics.median(seconds.get(stage, 0.0) for seconds in by_stage) for stage in STAGES},
        "flop_per_second": flop / median,
        "share_of_matmul_peak": flop / median / peaks.matmul_flop_per_second,
        "share_of_copy_peak": num_bytes / median / peaks.copy_bytes_per_second,
        "peak_memory_mib": peak,
        "first_update_seconds": seconds[0],
        "compiling": {name: getattr(compilations, name) - getattr(before, name) for name in ("seconds", "compiled", "found")},
    }


def count_way(way: Way) -> dict[str, Any]:
    """Count one update on shapes alone, whatever its size; return a row without times."""
    with shapes_alone():
        state = _state(way, META)
        with CountedWork() as work:
            update(state, 1)  # the first one also refreshes grids
    return _row(way, work)


def _state(way: Way, device: torch.device) -> TrainingState:
    state = build_state(way.config, Layout.of(way.config.num_particles, num_views=way.config.num_views), device)
    way.change(state)
    return state


def _row(way: Way, work: CountedWork) -> dict[str, Any]:
    config = way.config
    return {
        "name": way.name,
        "num_particles": config.num_particles,
        "particles_per_update": way.particles_per_update,
        "precision": config.precision,
        "render_size": config.render_size,
        "flop": sum(work.flop.values()),
        "flop_by_stage": dict(work.flop),
        "bytes": sum(work.bytes.values()),
        "bytes_by_stage": dict(work.bytes),
        "num_operations": work.num_operations,
        "notes": list(way.notes),
    }
