"""Pictures of particle flows. Importing this needs matplotlib: `pip install dist_vsd[bench]`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window; must come before pyplot
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dist_vsd.lab.settings import Variant
from dist_vsd.priors.gaussian_mixture import GaussianMixturePrior

COLORS = {"denoising": "#aa7711", "sds": "#cc3344", "exact": "#2255aa"}
LEARNED_COLORS = ("#66bb77", "#2f9e5f", "#117744", "#003a1c")  # from few phi steps to many
FRESH_COLOR = "#777777"
SHOWN_AT = (0.04, 0.2, 1.0)  # of all updates, a row each
NUM_PATHS = 60  # particles whose way is drawn
GRID, MARGIN = 160, 1.2
CURVES = {"energy_distance": "energy distance to the target", "phi_gap": "phi's gap: mean |eps_phi - exact eps|²"}
LEAST = 1e-5  # of what is drawn: an estimate of a distance near zero may fall below zero
CELL_INCHES, CURVES_INCHES = 2.15, 2.9


@dataclasses.dataclass(frozen=True)
class Shown:
    """A run in a picture.

    Attributes:
        variant: what it is.
        theta: (S, n, D), particles when they were looked at.
        updates: S of them.
        lines: of its metrics.jsonl.
    """

    variant: Variant
    theta: Tensor
    updates: list[int]
    lines: list[dict[str, Any]]


def representatives(variants: Sequence[Variant]) -> list[Variant]:
    """Return those that get a column of their own: each method, exact phi, and of learned phi the fewest and the most steps."""
    learned = sorted((v for v in variants if v.phi == "learned"), key=lambda v: v.phi_steps)
    ends = [learned[0], next(v for v in learned if v.phi_steps == learned[-1].phi_steps)] if learned else []
    return [v for v in variants if v.phi != "learned"] + list(dict.fromkeys(ends))


def color_of(variant: Variant, variants: Sequence[Variant]) -> str:
    """Return a variant's colour: of its method, and darker the more phi steps there are."""
    if variant.phi != "learned":
        return COLORS[variant.phi or variant.method]
    steps = sorted({v.phi_steps for v in variants if v.phi == "learned"})
    position = steps.index(variant.phi_steps) / max(1, len(steps) - 1)
    return LEARNED_COLORS[round(position * (len(LEARNED_COLORS) - 1))]


def draw_comparison(shown: Sequence[Shown], prior: GaussianMixturePrior, fresh: float | None, title: str, file: Path) -> None:
    """Draw particles over the target's density, a column a method and a row a moment; below, energy distance and phi's gap over updates.

    Args:
        shown: the runs, on the same mixture.
        prior: the mixture; of more than two dimensions the first two are shown.
        fresh: the energy distance of as many fresh samples, drawn as a line.
        title: above all.
        file: PNG to write.
    """
    variants = [run.variant for run in shown]
    chosen = representatives(variants)
    columns = [next(run for run in shown if run.variant == variant) for variant in chosen]
    moments = moments_of(columns[0].updates)
    curves = [name for name in CURVES if any(name in line for run in shown for line in run.lines)]
    width = max(CELL_INCHES * len(columns), 7.0)
    heights = (CELL_INCHES * width / (CELL_INCHES * len(columns)) * len(moments), CURVES_INCHES if curves else 0.01)
    figure = pyplot.figure(figsize=(width, min(sum(heights), 16.0) + 0.6), layout="constrained", facecolor="white")
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    figure.suptitle(title, fontsize=10)
    draw_particles(above, columns, moments, prior, [color_of(variant, variants) for variant in chosen])
    if curves:
        axes = below.subplots(1, len(curves), squeeze=False)[0]
        for panel, name in zip(axes, curves, strict=True):
            draw_curves(panel, shown, name, fresh if name == "energy_distance" else None)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(file, dpi=110, facecolor="white")
    pyplot.close(figure)


def moments_of(updates: Sequence[int]) -> list[int]:
    """Return the indices of the looks nearest to SHOWN_AT."""
    return sorted({min(range(len(updates)), key=lambda i: abs(updates[i] - share * updates[-1])) for share in SHOWN_AT})


def draw_particles(
    figure: Figure | Any, columns: Sequence[Shown], moments: Sequence[int], prior: GaussianMixturePrior, colors: Sequence[str]
) -> None:
    """Draw a grid of clouds, each with the ways that lead to it from the moment above."""
    flat = prior.marginal(tuple(range(min(2, prior.num_dimensions))))
    limits = limits_of(flat, [run.theta for run in columns])
    panels = figure.subplots(len(moments), len(columns), squeeze=False, sharex=True, sharey=True)
    for column, (run, color) in enumerate(zip(columns, colors, strict=True)):
        panels[0, column].set_title(run.variant.label, fontsize=9, color=color)
        for row, moment in enumerate(moments):
            axes = panels[row, column]
            begin = moments[row - 1] if row else 0
            draw_cloud(axes, flat, run.theta[begin : moment + 1, :, :2], limits, color)
            if column == 0:
                axes.set_ylabel(f"update {run.updates[moment]}", fontsize=9)


def limits_of(flat: GaussianMixturePrior, thetas: Sequence[Tensor]) -> tuple[float, float]:
    """Return low and high of both axes: the modes, three standard deviations around them, and nearly all particles at the end."""
    variances = flat.covariances if flat.covariances.ndim == 1 else flat.covariances.diagonal(dim1=-2, dim2=-1).max(-1).values
    reach = float((flat.means.abs().max(-1).values + 3 * variances.sqrt()).max())
    ends = torch.cat([theta[-1, :, :2].flatten() for theta in thetas]).abs()
    return -max(reach, min(float(ends.max()), MARGIN * reach)), max(reach, min(float(ends.max()), MARGIN * reach))


def draw_cloud(axes: Axes, flat: GaussianMixturePrior, path: Tensor, limits: tuple[float, float], color: str) -> None:
    """Draw the last of (S, n, D) particles, D one or two, over the density; thin lines show where some came from."""
    grid = torch.linspace(*limits, GRID)
    if flat.num_dimensions == 1:
        axes.fill_between(grid, flat.log_density(grid[:, None]).exp(), color="#dddddd")
        axes.hist(path[-1, :, 0].numpy(), bins=60, range=limits, density=True, histtype="step", color=color)
    else:
        points = torch.cartesian_prod(grid, grid)
        density = flat.log_density(points).exp().reshape(GRID, GRID).T
        levels = [float(density.max()) * share for share in (0.02, 0.1, 0.3, 0.6, 1.0)]
        axes.contourf(grid, grid, density, levels=levels, colors=["#f1f1f1", "#e4e4e4", "#d5d5d5", "#c4c4c4"])
        axes.plot(*path[:, :NUM_PATHS].permute(2, 0, 1), color=color, linewidth=0.5, alpha=0.35)
        axes.scatter(*path[-1].T, s=3, color=color, linewidths=0, alpha=0.8)
        axes.set_ylim(*limits)
        axes.set_aspect("equal")
    axes.set_xlim(*limits)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#cccccc")


def draw_curves(axes: Axes, shown: Sequence[Shown], name: str, fresh: float | None) -> None:
    """Draw a figure over updates, a line a run; dashed where phi learns first."""
    variants = [run.variant for run in shown]
    for run in shown:
        lines = [line for line in run.lines if name in line]
        if lines:
            style = "--" if run.variant.order == "phi_then_theta" else "-"
            updates = [line["update"] for line in lines]
            values = [max(line[name], LEAST) for line in lines]
            axes.plot(updates, values, style, color=color_of(run.variant, variants), linewidth=1.2, label=run.variant.label)
    if fresh is not None:
        axes.axhline(fresh, color=FRESH_COLOR, linewidth=1, linestyle=":", label="fresh samples, mean")
    axes.set_yscale("log")
    axes.set_xlabel("update", fontsize=9)
    axes.set_title(CURVES[name], fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#eeeeee")
