"""What a run would take: `train --dry-run`."""

from __future__ import annotations

import statistics
import time

from dist_vsd.config import RunConfig
from dist_vsd.config_files import to_yaml
from dist_vsd.distributed.layout import Layout
from dist_vsd.distributed.process import Process
from dist_vsd.training.state import build_state, phi_tensors
from dist_vsd.training.update import update

MEASURED_UPDATES = 4


def print_estimate(config: RunConfig, layout: Layout, process: Process) -> int:
    """Print the configuration, the layout, memory by what holds it, and time from a few real updates (collective).

    Nothing is written to disk. The updates that are timed are thrown away with the process.
    """
    state = build_state(config, layout, process.device, process.accelerator)
    prior_bytes = state.prior.num_bytes
    theta_numbers = sum(p.numel() for p in state.particles[0].theta.parameters())
    phi_numbers = sum(p.numel() for p in phi_tensors(state).values())
    seconds = []
    for index in range(MEASURED_UPDATES):
        begin = time.perf_counter()
        update(state, index, measure=True)
        seconds.append(time.perf_counter() - begin)
    each = statistics.median(seconds[1:])
    if layout.rank:
        return 0
    mib = 2**20
    print(to_yaml(config), end="")
    print(layout_table(layout))
    print("memory of a rank, MiB (fp32 theta and phi with gradient and two Adam moments; activations not counted):")
    print(f"  frozen prior      {prior_bytes / mib:10.1f}")
    num_owned = len(state.particles)
    print(f"  theta             {16 * theta_numbers * num_owned / mib:10.1f}   ({num_owned} x {theta_numbers:,} numbers)")
    print(f"  phi               {16 * phi_numbers / mib:10.1f}   ({phi_numbers:,} numbers)")
    minutes = each * config.num_updates / 60
    print(f"time: {each:.2f} s an update (median of {MEASURED_UPDATES - 1} real ones here), {minutes:.1f} minutes in all")
    return 0


def layout_table(layout: Layout) -> str:
    """Return who owns what, a line a rank."""
    mesh = f"{layout.num_shards} shard(s) x {layout.view_ranks} rank(s) a particle"
    lines = [f"layout: {layout.num_particles} particle(s) on {layout.world_size} rank(s), {mesh}, {layout.num_views} view(s) a particle"]
    for row in layout.rows():
        ids, views = ", ".join(map(str, row.particles)), ", ".join(map(str, row.views))
        lines.append(f"  rank {row.rank}: shard {row.shard}, particle(s) {ids}, view(s) {views}")
    busy = layout.num_renders / (layout.max_renders * layout.world_size)
    if busy < 1:
        lines.append(f"  ranks are busy {busy:.0%} of the time: the number of particles does not divide evenly")
    return "\n".join(lines)
