"""The lineage compared: every objective on the same particles, cameras, prior and budget, with the same instruments.

    make compare                                  all of it; stopped at any time, the same command goes on, run by run
    make compare-quick                            3 prompts, 1 seed, without the parts `options` and `settings`
    python benchmarks/compare.py --parts variety  one part

Its parts, described in compare_report.py, are sweeps (`dist-vsd sweep`) under runs/compare, two runs at a time with a thread each.
Writes benchmarks/results/compare.json, docs/compare.md and pictures beside it (compare_pictures.py).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from compare_pictures import draw_flat, draw_objects, draw_options
from compare_report import COLUMNS, report_of, summary

from dist_vsd.config import RunConfig
from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.distributed.process import keep_freed_memory
from dist_vsd.evaluation.evaluation import evaluate_run
from dist_vsd.evaluation.instruments import Instruments
from dist_vsd.evaluation.metric_names import EVALUATION_FILE, METRICS, ONLY_WHEN_ASKED
from dist_vsd.evaluation.prior_samples import PriorSamples
from dist_vsd.evaluation.results_file import record_of, write_record
from dist_vsd.priors.clip import ClipScorer
from dist_vsd.runs.saved_run import open_run
from dist_vsd.scaling.machine import Places, commit_of_package, describe_machine
from dist_vsd.sweep.manifest import Sweep, nest, read_sweep
from dist_vsd.training.state import build_state
from dist_vsd.training.update import update

ROOT = Path(__file__).parent.parent
RUNS, RESULTS, DOCS = ROOT / "runs", ROOT / "benchmarks" / "results", ROOT / "docs"
PROMPTS = (
    "a red ball", "a purple cube", "an orange cone", "a yellow donut", "a blue mug", "a green duck",
    "a white snowman", "a yellow car", "a red chair", "a purple mushroom", "a green tree", "a blue house",
)  # fmt: skip
HARD_PROMPTS = ("a green duck", "a white snowman", "a red chair", "a blue house")
FREE_PROMPT = "a duck"
BASELINE = "sds 7.5"  # whose time is the budget of "at equal time"
SLOWER = 1.1  # by less than this, a method's time counts as equal

# What distinguishes the methods; everything else is the preset's.
OBJECTS: dict[str, dict[str, Any]] = {
    "denoising 7.5": {"objective": "denoising"},
    "clip": {"objective": "clip", "regularization.opacity": 0.0, "field.track_origin": True, "field.origin_decay": 0.99},
    "sds 7.5": {"objective": "sds"},
    "sds 30": {"objective": "sds", "guidance_scale": 30.0},
    "sds 100": {"objective": "sds", "guidance_scale": 100.0},
    "vsd 7.5": {"objective": "vsd"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "as the preset": {},
    "phi: 4 steps an update": {"score.steps_per_update": 4},
    "phi: loss on v": {"score.loss": "v"},
    "phi: no camera": {"score.camera": "none"},
    "phi: one pass for both": {"score.reuse_pass": True},
    "entropic, lambda 0.5": {"score.entropy_weight": 0.5},
    "Perp-Neg": {"prompting.perp_neg": True},
    "no view words": {"prompting.view_words": False},
    "t: smooth annealing": {"timesteps.annealing": "smooth"},
}
VARIETY: dict[str, dict[str, Any]] = {
    "ancestral 7.5": {"objective": "ancestral"},
    "denoising 7.5": {"objective": "denoising"},
    "sds 7.5": {"objective": "sds"},
    "sds 30": {"objective": "sds", "guidance_scale": 30.0},
    "sds 100": {"objective": "sds", "guidance_scale": 100.0},
    "vsd 7.5": {"objective": "vsd"},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "as the preset": {},
    "phi: 4 steps an update": {"score.steps_per_update": 4},
    "turns of 4 particles, 4 x updates": {"particles.theta_batch": 4, "particles.phi_batch": 4, "num_updates": 2400},
    "phi: rank 32": {"score.rank": 32},
    "phi: loss on v": {"score.loss": "v"},
    "phi: one pass for both": {"score.reuse_pass": True},
    "guidance 1": {"guidance_scale": 1.0},
    "guidance 3": {"guidance_scale": 3.0},
    "theta: learning rate x 3": {"latent.lr": 3e-2},
    "theta: starts from 0.1 of the noise": {"latent.initial_std": 0.1},
    "t: smooth annealing": {"timesteps.annealing": "smooth"},
    "t: never annealed": {"timesteps.annealing": "none"},
    "t: never annealed, phi: 4 steps": {"timesteps.annealing": "none", "score.steps_per_update": 4},
    "t: 0.2 at least": {"timesteps.min_fraction": 0.2},
}
PICTURES = ("image", "latent", "siren")  # presets, run as they are but for the number of particles
PICTURE_PROMPTS = ("a green duck", "a red car")


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much of it is run.

    Attributes:
        name: of its folder and files.
        prompts: of the part `objects`.
        seeds: of every run, but those of `options` and `settings`, which have the first.
        num_updates: of 3D runs.
        num_flat_updates: of 2D runs.
        num_flat_particles: of 2D runs.
        num_samples: of the prior, for distances to them.
        num_rounds: in which the methods take turns to be timed.
        num_azimuths: of the views that particles are judged by.
        num_timed_updates: of a method before the next one's turn.
        objects: further settings of 3D runs.
        parts: that are run unless others are asked for.
        variety: methods of that part.
    """

    name: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    num_updates: int
    num_flat_updates: int
    num_flat_particles: int
    num_samples: int = 256
    num_rounds: int = 9
    num_azimuths: int = 24
    num_timed_updates: int = 4
    objects: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: tuple[str, ...] = ("objects", "equal_time", "variety", "pictures")
    variety: tuple[str, ...] = tuple(VARIETY)


SCALES = {
    "full": Scale("compare", PROMPTS, (0, 1), 400, 600, 16, parts=tuple(COLUMNS)),
    "quick": Scale("compare_quick", (PROMPTS[5], PROMPTS[7], PROMPTS[9]), (0,), 300, 200, 16),
    "tiny": Scale(
        "compare_tiny", (PROMPTS[0],), (0,), 4, 2, 2, num_samples=4, num_rounds=1, num_azimuths=4, num_timed_updates=1,
        objects={"field.num_samples": 8}, variety=("ancestral 7.5", "vsd 7.5"),
    ),
}  # fmt: skip


def dist_vsd(*words: str) -> None:
    """Run a command of the package; two runs at a time must not fight for the cores."""
    subprocess.run([sys.executable, "-m", "dist_vsd", *words], check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run_sweep(folder: Path, preset: str, prompts: Iterable[str], seeds: Iterable[int], methods: dict[str, dict[str, Any]],
              common: dict[str, Any], jobs: int) -> Sweep:  # fmt: skip
    """Plan and run a sweep: each prompt by each method (its tag) and seed; what is done is not run again."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"prompt": prompt, "tags": [name], "overrides": common | settings} for prompt in prompts for name, settings in methods.items()
    ]
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sweep = folder / "sweep"
    dist_vsd("sweep", "plan", str(file), "--sweep-dir", str(sweep), "--seeds", ",".join(map(str, seeds)), "--preset", preset)
    dist_vsd("sweep", "submit", str(sweep), "--local", "--jobs", str(jobs))
    return read_sweep(sweep)


def evaluate(sweep: Sweep, num_samples: int, num_azimuths: int, jobs: int) -> list[dict[str, Any]]:
    """Return a record of each run, with its method; evaluations that were written are read back.

    Args:
        sweep: whose runs are done.
        num_samples: of the prior to compare with; 0: without.
        num_azimuths: from which 3D particles are looked at.
        jobs: processes; one is this one.
    """
    folders = [sweep.run_dir(run) for run in sweep.runs]
    missing = [folder for folder in folders if not (folder / EVALUATION_FILE).exists()]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) if jobs > 1 else contextlib.nullcontext() as pool:
        evaluated = (pool.map if pool else map)(evaluate_folder, missing, itertools.repeat(num_samples), itertools.repeat(num_azimuths))
        for number, folder in enumerate(evaluated, 1):
            print(f"[{number}/{len(missing)}] {folder.name}: evaluated", flush=True)
    records = []
    for run, folder in zip(sweep.runs, folders, strict=True):
        record = json.loads((folder / EVALUATION_FILE).read_text())
        kept = {key: record[key] for key in ("prompt", "seed", "update", "num_particles", "figures", "by_particle")}
        records.append({"method": run.tags[0], **kept, "seconds_an_update": seconds_an_update(folder)})
    return records


def evaluate_folder(folder: Path, num_samples: int, num_azimuths: int) -> Path:
    """Write the evaluation of a run into its folder, which is returned."""
    torch.set_num_threads(1)  # two processes' threads on two cores wait for one another
    saved, instruments = open_run(folder), instruments_of(num_samples, num_azimuths)
    write_record(record_of(folder, saved, evaluate_run(saved, instruments), {"instruments": list(instruments.metrics)}), folder)
    return folder


def seconds_an_update(folder: Path) -> float:
    """Return the median over the logged updates of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["seconds/update"] for line in lines if "seconds/update" in line)


@functools.cache
def instruments_of(num_samples: int, num_azimuths: int) -> Instruments:
    """Return all instruments, those that compare with samples of the prior only where there shall be some; kept, with the samples."""
    # t3bench takes longer than all the others together.
    metrics = tuple(name for name in METRICS if name != "t3bench" and (num_samples or name not in ONLY_WHEN_ASKED))
    samples = PriorSamples(num_samples) if num_samples else None
    judges = {"scorer": ClipScorer.load(), "in_embedded_language": True, "samples": samples}
    return Instruments(metrics=metrics, num_azimuths=num_azimuths, **judges)


def relative_seconds(
    methods: dict[str, dict[str, Any]], baseline: str, prompt: str, common: dict[str, Any], num_rounds: int, num_updates: int
) -> dict[str, float]:
    """Return the time of an update of each method over the baseline's, on one thread.

    The methods take turns, so that whatever else the machine does meets all of them: the median over rounds of the ratio in a round.

    Args:
        methods: settings by name.
        baseline: one of them.
        prompt: of all.
        common: settings of all.
        num_rounds: of a turn for each.
        num_updates: of a turn.
    """
    torch.set_num_threads(1)
    keep_freed_memory()  # as `train` does
    states = {name: build_state(*alone(prompt, common | settings), torch.device("cpu")) for name, settings in methods.items()}
    rounds: list[dict[str, float]] = []
    for index in range(num_rounds + 1):
        rounds.append({})
        for name, state in states.items():
            begin = time.perf_counter()
            for i in range(num_updates):
                update(state, num_updates * index + i)
            rounds[-1][name] = time.perf_counter() - begin
    # The first round warms up.
    return {name: statistics.median(turn[name] / turn[baseline] for turn in rounds[1:]) for name in methods}


def kept_seconds(folder: Path, methods: dict[str, dict[str, Any]], baseline: str, scale: Scale) -> dict[str, float]:
    """Return ``relative_seconds`` of a part, measured in a process of its own, or what was measured before: budgets follow from it."""
    file = folder / "relative_seconds.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            asked = (methods, baseline, scale.prompts[0], objects_settings(scale), scale.num_rounds, scale.num_timed_updates)
            file.write_text(json.dumps(pool.submit(relative_seconds, *asked).result()))
    return json.loads(file.read_text())


def alone(prompt: str, settings: dict[str, Any]) -> tuple[RunConfig, Layout]:
    """Return the configuration and layout of a run of the part `objects` on one process."""
    config = merge(load_preset("embedded"), nest(settings) | {"prompt": prompt}, "compare.py")
    return config, Layout.of(config.num_particles)


def run_objects(scale: Scale, jobs: int) -> dict[str, Any]:
    """Run the part `objects`."""
    common = objects_settings(scale)
    sweep = run_sweep(RUNS / scale.name / "objects", "embedded", scale.prompts, scale.seeds, OBJECTS, common, jobs)
    records = evaluate(sweep, 0, scale.num_azimuths, jobs)
    draw_objects(sweep, scale.prompts, OBJECTS, DOCS / f"{scale.name}.png")
    return {"records": records, "table": summary(records)}


def run_equal_time(scale: Scale, jobs: int) -> dict[str, Any]:
    """Run the part `equal_time`."""
    folder, common = RUNS / scale.name / "equal_time", objects_settings(scale)
    times = kept_seconds(folder, OBJECTS, BASELINE, scale)
    updates = {name: max(2, round(scale.num_updates / ratio)) for name, ratio in times.items() if ratio > SLOWER}
    methods = {name: OBJECTS[name] | {"num_updates": number} for name, number in updates.items()}
    if not methods:
        return {"records": [], "table": {}, "relative_seconds": times}
    records = evaluate(run_sweep(folder, "embedded", scale.prompts, scale.seeds, methods, common, jobs), 0, scale.num_azimuths, jobs)
    return {"records": records, "table": summary(records), "relative_seconds": times}


def objects_settings(scale: Scale) -> dict[str, Any]:
    return common_settings(scale.num_updates) | {"num_particles": 2} | scale.objects


def run_options(scale: Scale, jobs: int) -> dict[str, Any]:
    """Run the part `options`."""
    folder = RUNS / scale.name / "options"
    times = kept_seconds(folder, OPTIONS, next(iter(OPTIONS)), scale)
    sweep = run_sweep(folder, "embedded", HARD_PROMPTS, scale.seeds[:1], OPTIONS, objects_settings(scale), jobs)
    records = evaluate(sweep, 0, scale.num_azimuths, jobs)
    draw_options(sweep, HARD_PROMPTS, DOCS / f"{scale.name}_options.png")
    return {"records": records, "table": summary(records), "relative_seconds": times}


def common_settings(num_updates: int) -> dict[str, Any]:
    never = 1_000_000
    quiet = {"wandb.mode": "disabled", "turntables": False, "preview_every": never}
    return quiet | {"num_updates": num_updates, "checkpoint_every": max(1, num_updates // 2), "keep_checkpoints": 1}


def run_latents(part: str, seeds: Sequence[int], methods: dict[str, dict[str, Any]], scale: Scale, jobs: int) -> dict[str, Any]:
    """Run a part on latents of the free prompt."""
    common = common_settings(scale.num_flat_updates) | {"num_particles": scale.num_flat_particles}
    sweep = run_sweep(RUNS / scale.name / part, "latent", [FREE_PROMPT], seeds, methods, common, jobs)
    records = evaluate(sweep, scale.num_samples, scale.num_azimuths, jobs)
    draw_flat([sweep], [FREE_PROMPT], DOCS / f"{scale.name}_{part}.png")
    return {"records": records, "table": summary(records)}


def run_variety(scale: Scale, jobs: int) -> dict[str, Any]:
    """Run the part `variety`."""
    return run_latents("variety", scale.seeds, {name: VARIETY[name] for name in scale.variety}, scale, jobs)


def run_settings(scale: Scale, jobs: int) -> dict[str, Any]:
    """Run the part `settings`."""
    return run_latents("settings", scale.seeds[:1], SETTINGS, scale, jobs)


def run_pictures(scale: Scale, jobs: int) -> dict[str, Any]:
    """Run the part `pictures`."""
    records, sweeps = [], []
    for preset in PICTURES:
        common = common_settings(load_preset(preset).num_updates if scale is SCALES["full"] else scale.num_flat_updates)
        folder = RUNS / scale.name / "pictures" / preset
        sweeps.append(run_sweep(folder, preset, PICTURE_PROMPTS, scale.seeds[:1], {preset: {"num_particles": 4}}, common, jobs))
        records += evaluate(sweeps[-1], 0, scale.num_azimuths, jobs)
    draw_flat(sweeps, PICTURE_PROMPTS, DOCS / f"{scale.name}_pictures.png")
    return {"records": records, "table": summary(records)}


PARTS = dict(zip(COLUMNS, (run_objects, run_equal_time, run_options, run_variety, run_settings, run_pictures), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=list(SCALES), default="full")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS))
    parser.add_argument("--jobs", type=int, default=max(1, min(2, os.cpu_count() or 1)), help="runs at a time")
    parser.add_argument("--out", type=Path, help="folder for everything, instead of the repository's own places")
    arguments = parser.parse_args()
    if arguments.out is not None:
        global RUNS, RESULTS, DOCS
        RUNS = RESULTS = DOCS = arguments.out.absolute()
        arguments.out.mkdir(parents=True, exist_ok=True)
    scale = SCALES[arguments.scale]
    file = RESULTS / f"{scale.name}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for part in arguments.parts or scale.parts:
        where = {"commit": commit_of_package(), "machine": describe_machine(Places.of_this_machine(0))}
        results[part] = where | PARTS[part](scale, arguments.jobs)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
        report = report_of(scale.name, results)
        (DOCS / f"{scale.name}.md").write_text(report)
        print(report, flush=True)


if __name__ == "__main__":
    main()
