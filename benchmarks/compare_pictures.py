"""The pictures of benchmarks/compare.py: grids of particles, with their rows and columns named."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dist_vsd.cameras import look_at_origin
from dist_vsd.evaluation.views import capture, middle_of
from dist_vsd.image_files import tile, to_bytes
from dist_vsd.priors.sampling import sample_images
from dist_vsd.priors.stable_diffusion import StableDiffusionPrior
from dist_vsd.runs.saved_run import open_run
from dist_vsd.sweep.manifest import PlannedRun, Sweep

FONT_SIZE, MARGIN = 13, 6  # pixels


def by_method(sweep: Sweep, prompt: str, seed: int) -> dict[str, PlannedRun]:
    return {run.tags[0]: run for run in sweep.runs if run.prompt == prompt and run.seed == seed}


def two_sides(sweep: Sweep, run: PlannedRun) -> Tensor:
    """Render each particle of a run from a side and from the back: (2 P, 3, H, W)."""
    saved = open_run(sweep.run_dir(run))
    ones, (distance, fov_deg) = torch.ones(2), middle_of(saved.config.camera)
    return torch.cat(capture(saved, look_at_origin(torch.tensor([50.0, 200.0]), 15 * ones, distance * ones, fov_deg * ones)))


def draw_objects(sweep: Sweep, prompts: Iterable[str], methods: Iterable[str], file: Path) -> None:
    """Draw a row a prompt: the prior's own samples, then the particles of each method."""
    prior, rows = StableDiffusionPrior.load("embedded"), {}
    for prompt in prompts:
        samples = sample_images(prior, [f"{prompt}, {words}" for words in ("side view", "back view")], 50, 7.5, (0, 1))
        runs = by_method(sweep, prompt, sweep.runs[0].seed)
        rows[prompt] = torch.cat([samples, *(two_sides(sweep, runs[method]) for method in methods)])
    write_grid(rows, [("prior", 2), *((method, 4) for method in methods)], file)


def draw_options(sweep: Sweep, prompts: Sequence[str], file: Path) -> None:
    """Draw a row an option, with the particles of all prompts."""
    rows: dict[str, list[Tensor]] = {}
    for prompt in prompts:
        for name, run in by_method(sweep, prompt, sweep.runs[0].seed).items():
            rows.setdefault(name, []).append(two_sides(sweep, run))
    write_grid({name: torch.cat(pictures) for name, pictures in rows.items()}, [(prompt, 4) for prompt in prompts], file)


def draw_flat(sweeps: list[Sweep], prompts: Sequence[str], file: Path) -> None:
    """Draw a row a method, in the order of the manifest: its particles with the first seed, those of all prompts beside one another."""
    rows: dict[str, list[Tensor]] = {}
    cameras = look_at_origin(*(torch.tensor([value]) for value in (0.0, 15.0, 3.0, 40.0)))
    for sweep, prompt in itertools.product(sweeps, prompts):
        for name, run in by_method(sweep, prompt, sweep.runs[0].seed).items():
            rows.setdefault(name, []).extend(capture(open_run(sweep.run_dir(run)), cameras))
    whole = {name: torch.cat(pictures) for name, pictures in rows.items()}
    each = len(next(iter(whole.values()))) // len(prompts)
    write_grid(whole, [(prompt, each) for prompt in prompts], file)


def write_grid(rows: dict[str, Tensor], columns: Sequence[tuple[str, int]], file: Path) -> None:
    """Write pictures as a grid, with a name before each row and one over each group of columns.

    Args:
        rows: by name, (C, 3, H, W) in [0, 1].
        columns: name and width, in pictures, of each group; may be empty.
        file: PNG to write.
    """
    grid = Image.fromarray(to_bytes(tile(list(rows.values())))[0])
    height, width = next(iter(rows.values())).shape[-2:]
    font = ImageFont.load_default(FONT_SIZE)
    left = round(max(font.getlength(name) for name in rows)) + 2 * MARGIN
    top = FONT_SIZE + 2 * MARGIN if columns else 0
    page = Image.new("RGB", (left + grid.width, top + grid.height), "white")
    page.paste(grid, (left, top))
    draw = ImageDraw.Draw(page)
    for number, name in enumerate(rows):
        draw.text((left - MARGIN, top + (number + 0.5) * height), name, "black", font, anchor="rm")
    begin = 0
    for name, count in columns:
        x = left + begin * width
        draw.text((x + count * width / 2, top / 2), name, "black", font, anchor="mm")
        if begin:
            draw.line((x, 0, x, page.height), "#bbbbbb")
        begin += count
    file.parent.mkdir(parents=True, exist_ok=True)
    page.save(file, optimize=True)
