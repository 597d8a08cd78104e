"""The README's gallery: twelve prompts by VSD and by SDS, with recognition, overlap, time and pictures.

    make gallery                                all of it; stopped at any time, the same command goes on
    python benchmarks/gallery.py --only vsd     one method

Each run is `accelerate launch` with one rank a particle. Writes benchmarks/results/gallery.json, docs/gallery.md and
docs/gallery_<method>.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dist_vsd.cameras import turntable
from dist_vsd.evaluation.overlap import best_overlap
from dist_vsd.export.turntable import render_views
from dist_vsd.image_files import tile, write_png
from dist_vsd.particles.radiance_field import RadianceField
from dist_vsd.priors.clip import ClipScorer
from dist_vsd.priors.embedded.recognition import recognize
from dist_vsd.runs.run_directory import default_run_dir
from dist_vsd.runs.saved_run import SavedRun, open_run

ROOT = Path(__file__).parent.parent
RUNS, RESULTS, DOCS = ROOT / "runs" / "gallery", ROOT / "benchmarks" / "results" / "gallery.json", ROOT / "docs"
SUBJECTS = [
    ("ball", "red"), ("cube", "purple"), ("cone", "orange"), ("donut", "yellow"), ("mug", "blue"), ("duck", "green"),
    ("snowman", "white"), ("car", "yellow"), ("chair", "red"), ("mushroom", "purple"), ("tree", "green"), ("house", "blue"),
]  # fmt: skip
PRESETS = {"vsd": "embedded", "sds": "embedded-sds"}
NUM_PARTICLES, NUM_AZIMUTHS, ELEVATION_DEG = 2, 24, 15.0
SHOWN_AZIMUTHS = (0, 3, 6, 9, 12, 15, 18, 21)


def prompt_of(name: str, color: str) -> str:
    return f"{'an' if color[0] in 'aeiou' else 'a'} {color} {name}"


def run_prompt(method: str, prompt: str) -> Path:
    """Run one prompt unless it is done; return its run directory. The minutes of its processes are kept beside it."""
    directory = RUNS / method / default_run_dir(prompt).name
    if (directory / "gallery_minutes.json").exists():
        return directory
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch_configs" / "cpu.yaml")]
    command += ["--num_processes", str(NUM_PARTICLES), "-m", "dist_vsd", "train", prompt, "--preset", PRESETS[method]]
    command += ["--num-particles", str(NUM_PARTICLES), "--run-dir", str(directory)]
    if (directory / "config.yaml").exists():
        command.append("--resume")
    begin = time.monotonic()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.parent / f"{directory.name}.log", "a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
    minutes = (time.monotonic() - begin) / 60
    (directory / "gallery_minutes.json").write_text(json.dumps({"minutes": minutes, "resumed": "--resume" in command}))
    return directory


def measure(saved: SavedRun, subject: tuple[str, str], scorer: ClipScorer) -> tuple[dict[str, Any], torch.Tensor]:
    """Return the figures of a finished run and (P, V, 3, 64, 64) pictures of its particles."""
    camera = saved.config.camera
    cameras = turntable(NUM_AZIMUTHS, ELEVATION_DEG, sum(camera.distance) / 2, sum(camera.fov_deg) / 2)
    views, right, overlaps = [], [], []
    for theta in saved.particles.values():
        assert isinstance(theta, RadianceField)
        frames = render_views(theta, cameras, 64)
        views.append(frames)
        right.append(sum(pair == subject for pair in recognize(scorer, frames)) / NUM_AZIMUTHS)
        overlaps.append(best_overlap(theta, subject[0]).iou)
    minutes = json.loads((saved.path / "gallery_minutes.json").read_text())
    figures = {"recognized": sum(right) / len(right), "overlap": sum(overlaps) / len(overlaps), **minutes}
    return figures | {"recognized_by_particle": right, "overlap_by_particle": overlaps, "updates": saved.update}, torch.stack(views)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PRESETS), help="one method")
    parser.add_argument("--subjects", nargs="*", default=[], help="only these objects")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scorer = ClipScorer.load()
    subjects = [s for s in SUBJECTS if not arguments.subjects or s[0] in arguments.subjects]
    rows: dict[str, dict[str, Any]] = {}
    for method in [arguments.only] if arguments.only else list(PRESETS):
        pictures = []
        for subject in subjects:
            prompt = prompt_of(*subject)
            directory = run_prompt(method, prompt)
            figures, views = measure(open_run(directory), subject, scorer)
            pictures += [row[list(SHOWN_AZIMUTHS)] for row in views]
            rows.setdefault(prompt, {})[method] = figures
            print(f"{method}  {prompt:<20} recognised {figures['recognized']:.2f}  overlap {figures['overlap']:.2f}  "
                  f"{figures['minutes']:.1f} min", flush=True)  # fmt: skip
        write_png(tile(pictures), DOCS / f"gallery_{method}.png")
    if not arguments.subjects and not arguments.only:
        write_results(rows)


def mean(rows: dict[str, dict[str, Any]], method: str, name: str) -> float:
    return sum(row[method][name] for row in rows.values()) / len(rows)


def write_results(rows: dict[str, dict[str, Any]]) -> None:
    """Write the JSON record and the table."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"commit": commit, "machine": machine, "prompts": rows}, indent=1) + "\n")
    lines = [
        "# The gallery",
        "",
        f"`make gallery` at commit {commit} on {machine}: {NUM_PARTICLES} particles a prompt, one rank a particle.",
        f"Recognised: the share of {NUM_AZIMUTHS} views at elevation {ELEVATION_DEG:g} degrees in which the embedded CLIP finds object",
        "and colour among all 96 pairs. Overlap: intersection over union with the canonical scene at the best turn about z, scale",
        "and threshold. Minutes: of the whole process, on a shared machine.",
        "",
        "| prompt | VSD recognised | VSD overlap | SDS recognised | SDS overlap | VSD minutes |",
        "|---|---|---|---|---|---|",
    ]
    for prompt, row in rows.items():
        vsd, sds = row["vsd"], row["sds"]
        cells = [f"{vsd['recognized']:.2f}", f"{vsd['overlap']:.2f}", f"{sds['recognized']:.2f}", f"{sds['overlap']:.2f}"]
        lines.append(f"| {prompt} | {' | '.join(cells)} | {vsd['minutes']:.1f} |")
    averages = [mean(rows, m, n) for m in ("vsd", "sds") for n in ("recognized", "overlap")]
    lines.append(f"| **average** | {' | '.join(f'**{a:.2f}**' for a in averages)} | {mean(rows, 'vsd', 'minutes'):.1f} |")
    lines += ["", "VSD, two rows a prompt, in the order of the table:", "", "![VSD](gallery_vsd.png)"]
    lines += ["", "SDS:", "", "![SDS](gallery_sds.png)"]
    (DOCS / "gallery.md").write_text("\n".join(lines) + "\n")
    print(f"table: {DOCS / 'gallery.md'}")


if __name__ == "__main__":
    main()
