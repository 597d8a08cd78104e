"""All runs of a comparison as one record and one table: figures over seeds, beside those of fresh samples of the target."""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table

from dist_vsd.lab.measures import Target
from dist_vsd.lab.runs import Run, describe, mixture_name
from dist_vsd.lab.settings import Variant

FRESH = "fresh samples"
FRESH_REPEATS = 40
FRESH_SEED = 1000
SINGLE_FIGURES = ("energy_distance", "mode_weight_error", "in_mode_std", "kl", "kl_noised", "mean_phi_gap")
COLUMNS = ("energy distance", "weights off", "std in mode", "KL", "KL noised", "phi's gap")


def fresh_figures(target: Target, num_particles: int, measures: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the figures of FRESH_REPEATS sets of samples of the target, each as large as a cloud of particles."""
    generators = [torch.Generator().manual_seed(FRESH_SEED + i) for i in range(FRESH_REPEATS)]
    return [target.measure(target.prior.sample(num_particles, generator), measures) for generator in generators]


def spread(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean, lowest and highest of each figure over runs, None (infinite) where one of them is; of mode weights the mean."""
    row: dict[str, Any] = {}
    for name in SINGLE_FIGURES:
        values = [figure[name] for figure in figures if name in figure]
        if values and None in values:
            row[name] = None
        elif values:
            row[name] = {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}
    if "mode_weights" in figures[0]:
        row["mode_weights"] = [sum(weights) / len(figures) for weights in zip(*(f["mode_weights"] for f in figures), strict=True)]
    return row


def summarise(results: dict[Run, dict[str, Any]], targets: dict[str, Target]) -> dict[str, Any]:
    """Return the record of all finished runs: a row for each variant on each mixture, over its seeds.

    Args:
        results: of runs.execute.
        targets: by mixture.
    """
    first = next(iter(results))
    rows = []
    for mixture, target in targets.items():
        groups: dict[Variant, list[Run]] = {}
        for run in results:
            if run.mixture == mixture:
                groups.setdefault(run.variant, []).append(run)
        fresh = fresh_figures(target, first.settings.num_particles, first.measures)
        rows.append({"mixture": mixture_name(mixture), "label": FRESH, "seeds": [], "figures": spread(fresh)})
        for variant, runs in groups.items():
            seconds = [results[run]["seconds"] for run in runs]
            rows.append({
                "mixture": mixture_name(mixture), "label": variant.label, "variant": variant.name, "seeds": [run.seed for run in runs],
                "figures": spread([results[run]["figures"] for run in runs]), "seconds": sum(seconds) / len(seconds),
            })  # fmt: skip
    shared = {name: value for name, value in first.asked(targets[first.mixture].prior).items() if name in SHARED}
    mixtures = {mixture_name(mixture): describe(target.prior) for mixture, target in targets.items()}
    return {"settings": shared, "mixtures": mixtures, "rows": rows}


SHARED = (
    "num_particles", "num_updates", "start_std", "lr", "final_lr_fraction", "phi_lr", "guidance_scale", "process", "shift", "timesteps",
    "measures"
)  # fmt: skip


def table_of(record: dict[str, Any]) -> Table:
    """Return a record's rows as a table: means over seeds, of the energy distance with its range where there are several."""
    settings = record["settings"]
    table = Table(title=f"{settings['num_particles']} particles, {settings['num_updates']} updates, {process_label(settings)}")
    shown = [i for i, name in enumerate(SINGLE_FIGURES) if any(name in row["figures"] for row in record["rows"])]
    several = len(record["mixtures"]) > 1
    for name in (*(("mixture",) if several else ()), "method"):
        table.add_column(name, no_wrap=True)
    for i in shown:
        table.add_column(COLUMNS[i], justify="right")
    table.add_column("seconds", justify="right")
    for row in record["rows"]:
        cells = [cell_of(row["figures"], SINGLE_FIGURES[i]) for i in shown]
        seconds = f"{row['seconds']:.1f}" if "seconds" in row else ""
        table.add_row(*((row["mixture"],) if several else ()), row["label"], *cells, seconds)
    return table


def process_label(settings: dict[str, Any]) -> str:
    """Return the process of a record's settings, for people."""
    return settings["process"].replace("_", " ") + (f" with shift {settings['shift']:g}" if "shift" in settings else "")


def cell_of(figures: dict[str, Any], name: str) -> str:
    """Return a figure in a table."""
    if name not in figures:
        return ""
    value = figures[name]
    if value is None:
        return "inf"
    if name != "energy_distance":
        return f"{value['mean']:.3f}"
    mean = f"{value['mean']:.4f}"
    return mean if value["low"] == value["high"] else f"{mean} ({value['low']:.4f} to {value['high']:.4f})"

