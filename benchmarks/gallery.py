"""The README's gallery: twelve prompts in three stages, to textured meshes, with figures of the fields and of the meshes.

    make gallery                                 all of it; stopped at any time, the same command goes on
    python benchmarks/gallery.py --seeds 0 1 2   with other seeds beside the first
    python benchmarks/gallery.py --jobs 2        so many prompts at a time, each on one core

Each run is `dist-vsd train PROMPT --preset object --num-particles 1`, on one core. Writes benchmarks/results/gallery.json,
docs/gallery.md and docs/gallery.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dist_vsd.cameras import turntable
from dist_vsd.distributed.layout import Layout
from dist_vsd.evaluation.evaluation import evaluate_run
from dist_vsd.evaluation.instruments import Instruments
from dist_vsd.export.turntable import render_views
from dist_vsd.image_files import tile, write_png
from dist_vsd.priors.clip import ClipScorer
from dist_vsd.priors.embedded.scenes import WITH_A_FRONT
from dist_vsd.runs.run_directory import default_run_dir
from dist_vsd.runs.saved_run import SavedRun, open_run, read_config
from dist_vsd.scaling.counted_memory import count_peak
from dist_vsd.training.stages import stages_of

ROOT = Path(__file__).parent.parent
RUNS, RESULTS, DOCS = ROOT / "runs" / "gallery", ROOT / "benchmarks" / "results" / "gallery.json", ROOT / "docs"
SUBJECTS = [
    ("ball", "red"), ("cube", "purple"), ("cone", "orange"), ("donut", "yellow"), ("mug", "blue"), ("duck", "green"),
    ("snowman", "white"), ("car", "yellow"), ("chair", "red"), ("mushroom", "purple"), ("tree", "green"), ("house", "blue"),
]  # fmt: skip
PRESET, STAGES = "object", {"field": "coarse", "shape": "geometry", "mesh": "texture"}
METRICS = ("clip", "r_precision", "multi_face", "recognition", "overlap", "chamfer")
SHOWN_AZIMUTHS, ELEVATION_DEG, SHOWN_PIXELS = 6, 15.0, 96


def prompt_of(name: str, color: str) -> str:
    return f"{'an' if color[0] in 'aeiou' else 'a'} {color} {name}"


def run_prompt(prompt: str, seed: int) -> Path:
    """Train and export one prompt, as far as that is not done; return its run directory."""
    directory = RUNS / f"{default_run_dir(prompt).name}-{seed}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    if not (directory / "gallery_done").exists():
        words = ["train", prompt, "--preset", PRESET, "--num-particles", "1", "--seed", str(seed), "--no-turntables"]
        words += ["--wandb.mode", "disabled", "--run-dir", str(directory)]
        command(directory, [*words, *(["--resume"] if (directory / "config.yaml").exists() else [])])
        (directory / "gallery_done").touch()
    if not report_of(directory).exists():
        command(directory, ["export", str(directory), "--format", "glb"])
    return directory


def command(directory: Path, words: list[str]) -> None:
    """Run `dist-vsd` on one core; what it prints is kept beside the run's directory."""
    words, environment = [sys.executable, "-m", "dist_vsd", *words], os.environ | {"OMP_NUM_THREADS": "1"}
    with open(directory.parent / f"{directory.name}.log", "a") as log:
        subprocess.run(words, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)


def report_of(directory: Path) -> Path:
    """Return where an export says what was lost from particle to GLB."""
    return directory / "export" / "mesh_0000.json"


def measure(directory: Path, subject: tuple[str, str], instruments: Instruments) -> dict[str, Any]:
    """Return the figures of a finished run: of its field and of its mesh."""
    found: dict[str, Any] = {"export": json.loads(report_of(directory).read_text())}
    for kind, stage in STAGES.items():
        saved = open_run(directory.with_name(f"{directory.name}@{stage}"))
        evaluation = evaluate_run(saved, instruments)
        said = evaluation.predictions()
        views = list(zip(said["object"][0], said["color"][0], strict=True))
        figures = dict(evaluation.figures) | {"recognized": views.count(subject) / len(views)}
        if subject[0] in WITH_A_FRONT:
            figures["num_faces"] = said["num_faces"][0]
        has_surface = saved.config.representation_row.has_surface
        found[kind] = figures | ({"triangles": len(saved.particles[0].surface()[1])} if has_surface else {})
    return found | {"stages": stage_figures(directory)}


def stage_figures(directory: Path) -> dict[str, dict[str, float]]:
    """Return for each stage the seconds of an update, its updates' minutes, and the most memory that one holds on a GPU, counted."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for stage in stages_of(read_config(directory)):
        seconds = [line["seconds/update"] for line in lines if stage.first < line["update"] <= stage.last and "seconds/update" in line]
        each = sum(seconds) / len(seconds)
        layout = Layout.of(1, num_views=stage.config.num_views, views_per_shot=stage.config.num_views)
        counted = count_peak(stage.config, layout).num_bytes / 2**20
        found[stage.name] = {"seconds_per_update": each, "minutes": each * len(range(stage.first, stage.last)) / 60, "counted_mib": counted}
    return found


def pictures_of(saved: SavedRun) -> torch.Tensor:
    """Return a row of views, (SHOWN_AZIMUTHS, 3, SHOWN_PIXELS, SHOWN_PIXELS)."""
    camera = saved.config.camera
    cameras = turntable(SHOWN_AZIMUTHS, ELEVATION_DEG, sum(camera.distance) / 2, sum(camera.fov_deg) / 2)
    return render_views(saved.particles[0], cameras, SHOWN_PIXELS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="of the runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="prompts at a time")
    parser.add_argument("--subjects", nargs="*", default=[], help="only these objects")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    subjects = [s for s in SUBJECTS if not arguments.subjects or s[0] in arguments.subjects]
    instruments = Instruments(metrics=METRICS, scorer=ClipScorer.load(), in_embedded_language=True)
    rows: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        begun = [(s, seed, pool.submit(run_prompt, prompt_of(*s), seed)) for seed in arguments.seeds for s in subjects]
        for subject, seed, run in begun:
            figures = measure(run.result(), subject, instruments)
            rows.setdefault(prompt_of(*subject), {})[str(seed)] = figures
            told = "  ".join(f"{kind} {figures[kind]['recognized']:.2f} {figures[kind]['overlap/iou']:.2f}" for kind in ("field", "mesh"))
            minutes = sum(stage["minutes"] for stage in figures["stages"].values())
            print(f"{prompt_of(*subject):<20} seed {seed}  (recognised, overlap) {told}  {minutes:.1f} min", flush=True)
    write_pictures(subjects, arguments.seeds[0])
    if not arguments.subjects:
        write_results(rows, arguments.jobs)


def write_pictures(subjects: list[tuple[str, str]], seed: int) -> None:
    """Write a row for each prompt: the field's views, and the mesh's beside them."""
    rows = []
    for subject in subjects:
        directory = RUNS / f"{default_run_dir(prompt_of(*subject)).name}-{seed}"
        both = [pictures_of(open_run(directory.with_name(f"{directory.name}@{stage}"))) for stage in (STAGES["field"], STAGES["mesh"])]
        rows.append(torch.cat(both))
    write_png(tile(rows), DOCS / "gallery.png")


def mean(rows: dict[str, dict[str, Any]], kind: str, name: str) -> float:
    """Return the mean of a figure over prompts and seeds that have it."""
    values = [run[kind][name] for row in rows.values() for run in row.values() if name in run[kind]]
    return sum(values) / len(values)


def cells(runs: list[dict[str, Any]]) -> list[str]:
    """Return a table's cells for some runs: figures are means."""

    def average(kind: str, name: str) -> str:
        values = [run[kind][name] for run in runs if name in run[kind]]
        return f"{sum(values) / len(values):.2f}" if values else "-"

    minutes = sum(stage["minutes"] for run in runs for stage in run["stages"].values()) / len(runs)
    field = [average("field", name) for name in ("recognized", "recognition/view", "num_faces", "overlap/iou")]
    mesh = [average("mesh", name) for name in ("recognized", "overlap/iou", "chamfer/distance", "chamfer/normal_consistency")]
    psnr = sum(run["export"]["lost"]["psnr_db"] for run in runs) / len(runs)
    return [*field, *mesh, f"{psnr:.1f}", f"{minutes:.1f}"]


def stage_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return the table of the stages: means over all runs."""
    runs = [run for row in rows.values() for run in row.values()]
    head = "| after stage | minutes of its updates | GPU memory of an update, counted | R-precision | recognised | overlap | Chamfer |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for kind, stage in STAGES.items():
        minutes, counted = (sum(run["stages"][stage][name] for run in runs) / len(runs) for name in ("minutes", "counted_mib"))
        figures = [mean(rows, kind, name) for name in ("clip/r_precision", "recognized", "overlap/iou")]
        chamfer = f"{mean(rows, kind, 'chamfer/distance'):.3f}" if kind != "field" else "-"
        lines.append(f"| {stage} | {minutes:.1f} | {counted:,.0f} MiB | {' | '.join(f'{f:.2f}' for f in figures)} | {chamfer} |")
    return lines


def write_results(rows: dict[str, dict[str, Any]], jobs: int) -> None:
    """Write the JSON record and the table."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"commit": commit, "machine": machine, "jobs": jobs, "prompts": rows}, indent=1) + "\n")
    seeds = ", ".join(next(iter(rows.values())))
    lines = [
        "# The gallery",
        "",
        f"`make gallery` at commit {commit} on {machine}: `--preset object`, one particle a prompt, on one core, {jobs} prompts at",
        f"a time; seeds {seeds}. Recognised: the share of 24 views at elevation 15 degrees in which the embedded CLIP finds object and",
        "colour among all 96 pairs. View: in which it finds the side from which it is looked at. Faces: fronts that are counted around",
        "objects that have one (1 is right). Overlap: intersection over union with the canonical scene at the best turn about z and scale.",
        "Chamfer distance (scene units; the cube is 2 wide) and normal consistency: to that scene's surface. GLB PSNR: of the",
        "exported mesh's pictures to the particle's own renders, dB. Minutes: of all stages' updates.",
        "",
        "| prompt | field recognised | view | faces | overlap | mesh recognised | overlap | Chamfer | normals | GLB PSNR | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {prompt} | {' | '.join(cells(list(row.values())))} |" for prompt, row in rows.items()]
    lines.append(f"| **mean** | {' | '.join(cells([run for row in rows.values() for run in row.values()]))} |")
    lines += ["", *stage_table(rows), ""]
    lines += ["Fields on the left, meshes on the right, in the order of the table:", "", "![fields and meshes](gallery.png)"]
    (DOCS / "gallery.md").write_text("\n".join(lines) + "\n")
    print(f"table: {DOCS / 'gallery.md'}")


if __name__ == "__main__":
    main()
