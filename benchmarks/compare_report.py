"""What benchmarks/compare.py writes: tables in Markdown, and pictures with their rows and columns named."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dist_vsd.image_files import tile, to_bytes

FONT_SIZE, MARGIN = 13, 6  # pixels
COLUMNS = {
    "objects": {
        "R-precision": "clip/r_precision", "CLIP score": "clip/score", "object": "recognition/object", "colour": "recognition/color",
        "view": "recognition/view", "overlap": "overlap/iou", "multi-face": "particles/multi_face_rate",
        "diversity of the pair": "particles/diversity",
    },
    "variety": {
        "object": "recognition/object", "colour, bits": "recognition/color_bits", "view, bits": "recognition/view_bits",
        "diversity": "particles/diversity", "prior: colour": "samples/color_bits", "prior: view": "samples/view_bits",
        "prior: diversity": "samples/diversity", "FID": "samples/fid_clip",
    },
}  # fmt: skip
COLUMNS["options"] = COLUMNS["objects"]
COLUMNS["settings"] = COLUMNS["variety"]
COLUMNS["pictures"] = {
    "R-precision": "clip/r_precision", "CLIP score": "clip/score", "object": "recognition/object", "colour": "recognition/color",
    "diversity": "particles/diversity",
}  # fmt: skip


def summary(records: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return, by method and figure, mean and standard deviation over its runs, and their number."""
    table: dict[str, dict[str, list[float]]] = {}
    for method in dict.fromkeys(record["method"] for record in records):
        rows = [record["figures"] for record in records if record["method"] == method]
        names = dict.fromkeys(name for row in rows for name in row)
        table[method] = {}
        for name in names:
            values = [row[name] for row in rows if name in row]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            table[method][name] = [statistics.mean(values), spread, len(values)]
    return table


def table_of(part: str, result: dict[str, Any]) -> list[str]:
    """Return a Markdown table: a row a method, mean and standard deviation over its runs, and its time where that was measured."""
    columns, times = COLUMNS[part], result.get("relative_seconds", {})
    head = [*columns, *(["time of an update"] if times else [])]
    lines = [f"| | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
    for method, figures in result["table"].items():
        cells = []
        for name in columns.values():
            mean, spread, count = figures.get(name, (None, 0.0, 0))
            cells.append("" if mean is None else f"{mean:.3f}" + (f" ± {spread:.3f}" if count > 1 else ""))
        if times:
            cells.append(f"{times[method]:.2f}" if method in times else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


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
    Image.fromarray(np.asarray(page)).save(file, optimize=True)
