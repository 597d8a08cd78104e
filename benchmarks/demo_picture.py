"""The README's picture of `make demo`, and its seconds by stage, from runs/demo.

python benchmarks/demo_picture.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from dist_vsd.cameras import turntable
from dist_vsd.export.turntable import render_views
from dist_vsd.image_files import tile, write_png
from dist_vsd.runs.saved_run import open_run

ROOT = Path(__file__).parent.parent


def main() -> None:
    saved = open_run(ROOT / "runs" / "demo")
    camera = saved.config.camera
    cameras = turntable(8, 15.0, sum(camera.distance) / 2, sum(camera.fov_deg) / 2)
    rows = [render_views(theta, cameras, 96) for theta in saved.particles.values()]
    write_png(tile(rows), ROOT / "docs" / "demo.png")
    lines = [json.loads(line) for line in (saved.path / "metrics.jsonl").read_text().splitlines()]
    for name in sorted({key for line in lines for key in line if key.startswith("seconds/")}):
        print(f"{name:<18} {statistics.median(line[name] for line in lines if name in line):.3f}")


if __name__ == "__main__":
    main()
