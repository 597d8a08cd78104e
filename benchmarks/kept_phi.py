"""Whether the texture stage wants a new phi, or the one that the field was trained with.

    make gallery && python benchmarks/kept_phi.py

The texture stage of gallery's runs is done again twice, from the same geometry with the same draws: with a phi of its own, and with the
one that stage coarse has left (score.keep). Stopped at any time, the same command goes on. Writes benchmarks/results/kept_phi.json.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gallery import RUNS, SUBJECTS, command, prompt_of

from dist_vsd.evaluation.evaluation import evaluate_run
from dist_vsd.evaluation.instruments import Instruments
from dist_vsd.priors.clip import ClipScorer
from dist_vsd.runs.run_directory import default_run_dir
from dist_vsd.runs.saved_run import open_run

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "kept_phi.json"
NAMES = ("ball", "duck", "snowman", "chair", "mushroom", "house")
WAYS = {"new": "false", "kept": "true"}
METRICS = ("clip", "r_precision", "recognition")


def paint(subject: tuple[str, str], way: str) -> Path:
    """Do the texture stage of a gallery's run again; return its run directory."""
    name = f"{default_run_dir(prompt_of(*subject)).name}-0"
    directory = RUNS.parent / "kept_phi" / f"{name}-{way}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    if not (directory / "done").exists():
        words = ["train", prompt_of(*subject), "--preset", "object", "--num-particles", "1", "--no-turntables", "--wandb.mode", "disabled"]
        words += ["--stages", "texture", "--start-from", f"{RUNS / name}@geometry"]
        words += ["--stage", f"texture.score.keep={WAYS[way]}", "--run-dir", str(directory)]
        command(directory, ["train", "--resume", "--run-dir", str(directory)] if (directory / "config.yaml").exists() else words)
        (directory / "done").touch()
    return directory


def measure(directory: Path, subject: tuple[str, str], instruments: Instruments) -> dict[str, float]:
    evaluation = evaluate_run(open_run(directory), instruments)
    said = evaluation.predictions()
    views = list(zip(said["object"][0], said["color"][0], strict=True))
    return dict(evaluation.figures) | {"recognized": views.count(subject) / len(views)}


def main() -> None:
    torch.set_num_threads(1)
    instruments = Instruments(metrics=METRICS, scorer=ClipScorer.load(), in_embedded_language=True)
    subjects = [subject for subject in SUBJECTS if subject[0] in NAMES]
    rows: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        begun = [(subject, way, pool.submit(paint, subject, way)) for subject in subjects for way in WAYS]
        for subject, way, run in begun:
            rows.setdefault(prompt_of(*subject), {})[way] = figures = measure(run.result(), subject, instruments)
            print(f"{prompt_of(*subject):<20} {way:<5} " + "  ".join(f"{name} {value:.3f}" for name, value in figures.items()), flush=True)
    names = set.intersection(*(set(figures) for row in rows.values() for figures in row.values()))
    means = {way: {name: sum(row[way][name] for row in rows.values()) / len(rows) for name in sorted(names)} for way in WAYS}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    RESULTS.write_text(json.dumps({"commit": commit, "machine": machine, "mean": means, "prompts": rows}, indent=1) + "\n")
    print(json.dumps(means, indent=1))


if __name__ == "__main__":
    main()
