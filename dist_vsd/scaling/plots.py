"""Pictures of measurements. Importing this needs matplotlib: `pip install dist_vsd[bench]`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window; must come before pyplot
from matplotlib import pyplot
from matplotlib.axes import Axes

STAGE_COLORS = {"render": "#4477aa", "scores": "#66ccee", "backward": "#228833", "phi": "#ccbb44", "rest": "#bbbbbb"}
MODE_STYLES = {"weak": ("#aa3377", "o"), "strong": ("#4477aa", "s"), "control": ("#888888", "^")}


def plot_scaling(record: Mapping[str, Any], file: Path) -> None:
    """Draw the seconds of an update by stage, and efficiency over ranks.

    Args:
        record: of `bench scaling`.
        file: PNG to write.
    """
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1.4, 1), layout="constrained")
    draw_stages(left, record["rows"])
    draw_efficiency(right, record)
    commit = f", commit {record['commit']}" if record["commit"] else ""
    figure.suptitle(f"{record['machine']}, torch {record['torch']}{commit}", fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def plot_update(record: Mapping[str, Any], file: Path) -> None:
    """Draw what one particle's update costs, a bar a way: milliseconds by stage where they were measured, else operations.

    Args:
        record: of `bench update`.
        file: PNG to write.
    """
    figure, axes = pyplot.subplots(figsize=(1.8 + 1.8 * len(record["rows"]), 4.2), layout="constrained")
    key, factor, unit = ("stage_ms", 1.0, "ms") if record["peaks"] else ("flop_by_stage", 1e-9, "GFLOP")
    labels = [f"{row['name']}\n{row['precision']}" for row in record["rows"]]
    bottoms = [0.0] * len(labels)
    for stage, color in STAGE_COLORS.items():
        heights = [factor * row[key].get(stage, 0.0) / row["particles_per_update"] for row in record["rows"]]
        axes.bar(labels, heights, bottom=bottoms, color=color, label=stage)
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    axes.set_ylabel(f"{unit} a particle's update")
    axes.legend(fontsize=8)
    where = record["gpu"] or record["machine"] or "counted on shapes"
    axes.set_title(f"{record['size']}, {where}, torch {record['torch']}, commit {record['commit']}", fontsize=7)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def draw_stages(axes: Axes, rows: list[Mapping[str, Any]]) -> None:
    """Draw a stacked bar a row; rows whose ranks share cores are pale."""
    labels = [row_label(row) for row in rows]
    bottoms = [0.0] * len(rows)
    for stage, color in STAGE_COLORS.items():
        heights = [row["stages"].get(stage, row["seconds_per_update"] - sum(row["stages"].values())) for row in rows]
        bars = axes.bar(labels, heights, bottom=bottoms, color=color, label=stage)
        for bar, row in zip(bars, rows, strict=True):
            bar.set_alpha(0.35 if row["cores_shared"] else 1.0)
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    axes.set_ylabel("seconds an update")
    axes.set_title("stages (pale: ranks share cores)", fontsize=10)
    axes.tick_params(axis="x", labelsize=7)
    axes.legend(fontsize=8)


def row_label(row: Mapping[str, Any]) -> str:
    """Return a row's name under its bar."""
    if row["num_runs"] > 1:
        return f"{row['mode']}\n{row['num_runs']} runs\nat once"
    return f"{row['mode']}\n{row['num_ranks']} rank(s)\n{row['num_particles']} part."


def draw_efficiency(axes: Axes, record: Mapping[str, Any]) -> None:
    """Draw each mode's efficiency with the range over repeats; hollow where ranks share cores."""
    for mode, (color, marker) in MODE_STYLES.items():
        rows = [row for row in record["rows"] if row["mode"] == mode]
        if not rows:
            continue
        ranks = [row["num_ranks"] * row["num_runs"] for row in rows]
        own = [row["efficiency"] for row in rows]
        begin = ([1], [1.0]) if mode == "control" else ([], [])  # the control of one run is that run
        axes.plot(begin[0] + ranks, begin[1] + own, color=color, linewidth=1, label=mode_label(mode))
        for rank, row in zip(ranks, rows, strict=True):
            ratios = [repeat["efficiency"] for repeat in row["repeats"]]
            axes.vlines(rank, min(ratios), max(ratios), color=color, linewidth=1)
            axes.plot(rank, row["efficiency"], marker, color=color, markerfacecolor="white" if row["cores_shared"] else color)
    axes.axhline(1.0, color="black", linewidth=0.6, linestyle=":")
    axes.set_xscale("log", base=2)
    ticks = sorted({row["num_ranks"] * row["num_runs"] for row in record["rows"]})
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("ranks")
    axes.set_title("efficiency, range over repeats (hollow: ranks share cores)", fontsize=10)
    axes.legend(fontsize=8, loc="lower left")


def mode_label(mode: str) -> str:
    """Return a mode's name in the legend."""
    return {"control": "control: independent runs at once", "weak": "weak scaling", "strong": "strong scaling"}[mode]


def plot_memory(record: Mapping[str, Any], file: Path) -> None:
    """Draw a rank's peak memory over the number of particles.

    Args:
        record: of benchmarks/many_particles.py.
        file: PNG to write.
    """
    rows = sorted(record["sizes"].values(), key=lambda row: row["num_particles"])
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot([row["num_particles"] for row in rows], [row["peak_memory_mib"] for row in rows], "o-", color="#4477aa")
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["num_particles"] for row in rows], [str(row["num_particles"]) for row in rows])
    axes.set_ylim(0, 1.1 * max(row["peak_memory_mib"] for row in rows))
    axes.set_xlabel(f"particles at once, on {record['num_ranks']} ranks")
    axes.set_ylabel("peak memory of a rank, MiB")
    axes.set_title(f"{record['preset']}, {record['machine']}", fontsize=9)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
