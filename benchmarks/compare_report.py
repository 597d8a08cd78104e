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
PARTS = {
    "objects": "3D: twelve prompts, two seeds, two particles, at equal updates.",
    "equal_time": "The slower methods again, with as many updates as the time of `sds 7.5` allows.",
    "options": "3D by VSD: the four hardest prompts, one seed, with one option changed in each row.",
    "variety": "2D latents: 16 particles of `a duck`, which leaves colour and view open. Bits: the entropy of those recognised.",
    "settings": "The same by VSD, one seed, with one setting changed in each row.",
    "pictures": "2D by VSD as pixels, latents and coordinate networks, two prompts with four particles each.",
}
# The figures of each part.
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


def report_of(name: str, results: dict[str, Any]) -> str:
    """Return the page with the tables of all parts that were run, for the pictures of a comparison of this name."""
    lines = ["# The lineage compared", "", "By `python benchmarks/compare.py`; mean ± standard deviation over prompts and seeds.", ""]
    for part in (part for part in PARTS if part in results):
        lines += [f"## {part}", "", PARTS[part], "", *table_of(part, results[part]), ""]
        if part != "equal_time":
            lines += [f"![{part}]({name}{'' if part == 'objects' else f'_{part}'}.png)", ""]
        lines += [f"At commit {results[part]['commit']}; {results[part]['machine']}.", ""]
    return "\n".join(lines)


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
