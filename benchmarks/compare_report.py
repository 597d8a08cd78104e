"""The tables of benchmarks/compare.py, in Markdown: which figures each part shows, and their means and spreads over runs."""

from __future__ import annotations

import statistics
from typing import Any

IN_3D = {
    "R-precision": "clip/r_precision", "CLIP score": "clip/score", "object": "recognition/object", "colour": "recognition/color",
    "view": "recognition/view", "overlap": "overlap/iou", "multi-face": "particles/multi_face_rate",
    "diversity of the pair": "particles/diversity",
}  # fmt: skip
IN_2D = {
    "object": "recognition/object", "colour, bits": "recognition/color_bits", "view, bits": "recognition/view_bits",
    "diversity": "particles/diversity", "prior: colour": "samples/color_bits", "prior: view": "samples/view_bits",
    "prior: diversity": "samples/diversity", "FID": "samples/fid_clip",
}  # fmt: skip
# The figures of each part, in its order.
COLUMNS = {
    "objects": IN_3D,
    "equal_time": IN_3D,
    "options": IN_3D,
    "variety": IN_2D,
    "settings": IN_2D,
    "pictures": {name: IN_3D[name] for name in ("R-precision", "CLIP score", "object", "colour")} | {"diversity": "particles/diversity"},
}


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
    """Return a Markdown table: a row a method, mean and standard deviation over its runs; and the methods' times where measured."""
    columns, times = COLUMNS[part], result.get("relative_seconds", {})
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for method, figures in result["table"].items():
        cells = []
        for name in columns.values():
            mean, spread, count = figures.get(name, (None, 0.0, 0))
            cells.append("" if mean is None else f"{mean:.3f}" + (f" ± {spread:.3f}" if count > 1 else ""))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    if times:
        lines += ["", "Time of an update, relative: " + ", ".join(f"{method} {ratio:.2f}" for method, ratio in times.items()) + "."]
    return lines
