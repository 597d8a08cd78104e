"""What a run would take: `train --dry-run`."""

from __future__ import annotations

import dataclasses
import statistics
import time

from dist_vsd.config import RunConfig
from dist_vsd.config_files import to_yaml
from dist_vsd.distributed.layout import Layout
from dist_vsd.distributed.process import Process
from dist_vsd.scaling.cost_model import most_renders
from dist_vsd.scaling.fit import Needs
from dist_vsd.scaling.memory import MIB, Memory, telling_out_of_memory
from dist_vsd.scaling.room import cards_in_words
from dist_vsd.training.stages import Stage, stages_of
from dist_vsd.training.state import TrainingState, build_state
from dist_vsd.training.update import update

MEASURED_UPDATES = 4
# Of a rank with more, so many are timed and the rest is taken in proportion: the answer does not wait for thousands.
TIMED_PARTICLES, TIMED_SHOTS = 8, 4


def print_estimate(config: RunConfig, layout: Layout, process: Process) -> int:
    """Print the configuration, the layout, and of each stage memory by what holds it and time from a few real updates (collective).

    Nothing is written to disk. The updates that are timed are thrown away with the process.

    Args:
        config: of the run.
        layout: of its particles.
        process: this one.
    """
    stages, lines, minutes = stages_of(config), [], 0.0
    for stage in stages:
        if process.accelerator is not None:
            process.accelerator.free_memory()  # of the stage before
        own, seconds = _estimate(stage, layout, process)
        minutes += seconds * stage.config.num_updates / 60
        lines += [f"stage {stage.name}, {stage.config.num_updates} updates:", *own] if len(stages) > 1 else own
    if layout.rank == 0:
        print(to_yaml(config), end="")
        print("\n".join([layout_table(layout), *lines, f"in all: {minutes:.1f} minutes"]))
    return 0


def _estimate(stage: Stage, layout: Layout, process: Process) -> tuple[list[str], float]:
    """Return what is to be told of a stage, and the seconds of an update (collective)."""
    config, memory = stage.config, Memory.of(process.device)
    few, few_layout = _few_of(config, layout)
    with telling_out_of_memory(memory, lambda free: Needs.of(config, layout, process.device).advice(free)):
        state = build_state(few, few_layout, process.device, process.accelerator)
        needs = Needs.of(config, layout, process.device, state)
        seconds = _time_update(state) * most_renders(layout) / most_renders(few_layout)
    lines = ["memory of the fullest rank, MiB (theta and phi with gradient and two Adam moments):"]
    remarks = {
        "theta": f"(of a particle: {needs.sizes.theta_numbers:,} numbers)",
        "phi": f"({needs.sizes.phi_numbers:,} numbers)",
        "activations": "(the renders of a micro-batch and their encoding: estimated)",
    }
    lines += [f"  {name:<17} {size / MIB:10.1f}   {remarks.get(name, '')}".rstrip() for name, size in needs.parts().items()]
    lines.append(f"  {'free now':<17} {memory.free / MIB:10.1f}   (of {memory.where})")
    lines += cards_in_words(config, layout)
    share = "" if few_layout == layout else f" of {few.num_particles} particle(s) with {few_layout.num_views} view(s), and in proportion"
    lines.append(f"time: {seconds:.2f} s an update (median of {MEASURED_UPDATES - 1} real ones here{share})")
    return lines, seconds


def _few_of(config: RunConfig, layout: Layout) -> tuple[RunConfig, Layout]:
    """Return the run that is timed: this one, or one like it with fewer particles and views where a rank has many."""
    take_turns = config.particles.theta_batch or config.particles.phi_batch  # then the time is not in proportion to their number
    num_particles = layout.num_particles if take_turns else min(layout.num_particles, TIMED_PARTICLES * layout.num_shards)
    num_views = min(layout.num_views, TIMED_SHOTS * layout.view_ranks * layout.views_per_shot)
    few = dataclasses.replace(layout, num_particles=num_particles, num_views=num_views)
    return dataclasses.replace(config, num_particles=few.num_particles, num_views=few.num_views), few


def _time_update(state: TrainingState) -> float:
    """Return the seconds of an update, without the first one."""
    seconds = []
    for index in range(MEASURED_UPDATES):
        begin = time.perf_counter()
        update(state, index, measure=True)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def layout_table(layout: Layout) -> str:
    """Return who owns what, a line a rank."""
    mesh = f"{layout.num_shards} shard(s) x {layout.view_ranks} rank(s) a particle"
    lines = [f"layout: {layout.num_particles} particle(s) on {layout.world_size} rank(s), {mesh}, {layout.num_views} view(s) a particle"]
    for row in layout.rows():
        lines.append(f"  rank {row.rank}: shard {row.shard}, particle(s) {_span(row.particles)}, view(s) {_span(row.views)}")
    busy = layout.num_renders / (layout.max_renders * layout.world_size)
    if busy < 1:
        lines.append(f"  ranks are busy {busy:.0%} of the time: the number of particles does not divide evenly")
    return "\n".join(lines)


def _span(ids: range) -> str:
    """Write consecutive ids for a reader: "3", "0, 1", "0-7"."""
    return ", ".join(map(str, ids)) if len(ids) < 3 else f"{ids[0]}-{ids[-1]}"
