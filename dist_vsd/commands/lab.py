"""`dist-vsd lab`: methods of score distillation on priors whose scores are known exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dist_vsd.commands.arguments import parse
from dist_vsd.commands.help import Pages
from dist_vsd.config import flag, nearest
from dist_vsd.errors import RunFailed
from dist_vsd.lab.settings import MEASURES, METHODS, ORDERS, PHIS, Settings, Variant, check_measures
from dist_vsd.writable import require_writable_file, require_writable_folder

if TYPE_CHECKING:
    from dist_vsd.lab.measures import Target
    from dist_vsd.lab.runs import Run

STOPPED = 75
SUMMARY = "lab.json"
DESCRIPTION = """Compare denoising, SDS and VSD on mixtures of Gaussians: no network is needed, and the target is known exactly.

  dist-vsd lab                                                        four modes in the plane, under a minute
  dist-vsd lab --mixture ring --phi exact learned --phi-steps 1 5     phi exact, and learned with 1 and with 5 steps an update
  dist-vsd lab --methods vsd --phi learned --order theta_then_phi phi_then_theta --seed 0 1 2
  dist-vsd lab --process rectified_flow --shift 3 --out lab_flow      as Stable Diffusion 3 noises, and predicts velocities
  dist-vsd lab --mixture mine.yaml --num-particles 256                with {components: [{weight: 1, mean: [0, 0], std: 1}]} in mine.yaml

A component has a weight, a mean, and std or covariance. Every combination is a run; finished ones are not run again. Stopped at any
time, the same command goes on with the next. It uses the CPU."""

PAGES = Pages(
    examples="""Denoising, SDS and VSD where the target is known exactly: figures and pictures of the particles.

  dist-vsd lab --mixture four_gaussians ring
  dist-vsd lab --methods vsd --phi learned --phi-steps 1 10 --seed 0 1 2""",
    everyday=("--mixture", "--methods", "--phi", "--phi-steps", "--seed", "--num-particles", "--num-updates", "--process", "--out"),
    topics={
        "What is compared": ("--mixture", "--methods", "--phi", "--phi-steps", "--order", "--seed", "--measures"),
        "The particles and how they move": (
            "--num-particles", "--num-updates", "--start-std", "--lr", "--final-lr-fraction", "--phi-lr", "--guidance-scale",
        ),
        "The noise": ("--process", "--shift", "--timesteps."),
        "Output": ("--out", "--no-pictures"),
    },
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabArguments:
    """What `lab` takes."""

    mixture: tuple[str, ...] = ("four_gaussians",)
    """four_gaussians, ring, ellipses (full covariances), sixteen_dimensions, or .json and .yaml files."""
    methods: tuple[str, ...] = METHODS
    """denoising, sds, vsd."""
    phi: tuple[str, ...] = ("exact",)
    """Of vsd: exact (the particles' own noised density), learned (a small network)."""
    phi_steps: tuple[int, ...] = (1,)
    """Of a learned phi, an update."""
    order: tuple[str, ...] = (ORDERS[0],)
    """Of a learned phi: theta_then_phi (Algorithm 1: phi is one update behind), phi_then_theta (phi learns first, L2-VSD's lookahead)."""
    seed: tuple[int, ...] = (0,)
    """Of every random draw; several give means and ranges."""
    measures: tuple[str, ...] = MEASURES
    """What to measure: energy_distance, mode_weights, in_mode_std, kl, kl_noised, phi_gap (learned phi). The start of
    dist_vsd/lab/measures.py has their definitions."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings()
    """Of all variants."""
    out: str = "lab"
    """Folder for runs, lab.json and a picture of each mixture."""
    pictures: bool = True
    """Draw them (needs matplotlib)."""

    def __post_init__(self) -> None:
        for name, choices in (("methods", METHODS), ("phi", PHIS), ("order", ORDERS)):
            for value in getattr(self, name):
                if value not in choices:
                    raise ValueError(f"{flag(name)} must be some of {', '.join(choices)}, got {value[:60]!r}{nearest(value, choices)}")
        for name in ("mixture", "methods", "phi", "phi_steps", "order", "seed", "measures"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{flag(name)} must hold at least one value, each once, got {' '.join(map(str, values)) or 'none'}")
        for name, least in (("phi_steps", 1), ("seed", 0)):
            if min(getattr(self, name)) < least:
                raise ValueError(f"{flag(name)} must be at least {least}, got {min(getattr(self, name))}: raise it")
        check_measures(self.measures, self.settings.num_particles)


def run(arguments: list[str]) -> int:
    """Run the command; see cli.main for the exit codes."""
    parsed = parse(LabArguments, arguments, "lab", DESCRIPTION, pages=PAGES)
    out = Path(parsed.out)
    require_writable_folder(out / "runs", f"--out {parsed.out!r}")
    require_writable_file(out / SUMMARY, f"--out {parsed.out!r}")

    from dist_vsd.lab.runs import execute, read_result
    from dist_vsd.runs.stop_request import StopRequest
    from dist_vsd.scaling.memory import Memory, telling_out_of_memory

    runs, priors = plan(parsed), load_mixtures(parsed)
    check_guidance(parsed.settings, next(iter(priors.values())))
    results = {run: read_result(folder_of(run, out), run.asked(priors[run.mixture])) for run in runs}
    pending = [run for run in runs if results[run] is None]
    if len(pending) < len(runs):
        say(f"{len(runs) - len(pending)} of {len(runs)} runs are finished in {out}")
    stop = StopRequest().install()
    try:
        less = telling_out_of_memory(Memory.of("cpu"), lambda _memory: "lower --num-particles, or the dimensions of --mixture")
        with less, progress(len(pending) * parsed.settings.num_updates) as (advance, tell):
            targets = make_targets(priors)
            for run in pending:
                result = execute(run, targets[run.mixture], folder_of(run, out), lambda: stop.requested, advance)
                if result is None:
                    say(f"stopped by {stop.signal_name}: finished runs are in {out}, the same command goes on")
                    return STOPPED
                results[run] = result
                tell(f"{run.name}: {result['seconds']:.1f} s")
        finish({run: result for run, result in results.items() if result is not None}, targets, out, parsed.pictures)
    except OSError as error:
        raise RunFailed(f"{out} can't be written ({error.strerror}): free some space; finished runs are kept") from error
    return 0


def plan(parsed: LabArguments) -> list[Run]:
    """Return all runs that are asked for, seed by seed, so that a stopped comparison is whole for the first ones."""
    from dist_vsd.lab.runs import Run, mixture_name

    names = [mixture_name(mixture) for mixture in parsed.mixture]
    if len(set(names)) < len(names):
        raise ValueError(f"--mixture must name different mixtures, got {' '.join(names)} as the names of their files: rename one")
    return [
        Run(mixture, variant, seed, parsed.settings, parsed.measures)
        for seed in parsed.seed
        for mixture in parsed.mixture
        for variant in variants_of(parsed)
    ]


def variants_of(parsed: LabArguments) -> list[Variant]:
    """Return each method once; vsd with each phi, and a learned phi with each number of steps in each order."""
    variants = []
    for method in parsed.methods:
        for phi in parsed.phi if method == "vsd" else ("",):
            if phi == "learned":
                variants += [Variant(method, phi, steps, order) for order in parsed.order for steps in parsed.phi_steps]
            else:
                variants.append(Variant(method, phi))
    return variants


def load_mixtures(parsed: LabArguments) -> dict[str, Any]:
    """Return the mixtures by name; ValueError says what is wrong with one."""
    from dist_vsd.lab.mixtures import load_mixture, process_of

    process = process_of(parsed.settings)
    return {name: load_mixture(name, process) for name in parsed.mixture}


def check_guidance(settings: Settings, prior: Any) -> None:
    """Refuse a guidance scale that the prior can't give, by asking for one gradient."""
    import torch

    from dist_vsd.lab.flow import gradient

    point, t = torch.zeros(1, prior.num_dimensions), prior.process.draw_t(torch.zeros(1), 0.5, 0.5)
    gradient(prior, "sds", None, point, t, point, settings)  # type: ignore[arg-type]


def make_targets(priors: dict[str, Any]) -> dict[str, Target]:
    """Return what particles are measured against, by mixture."""
    from dist_vsd.lab.measures import Target

    return {name: Target(prior) for name, prior in priors.items()}


def folder_of(run: Run, out: Path) -> Path:
    """Return where a run is kept."""
    return out / "runs" / run.name


@contextlib.contextmanager
def progress(num_updates: int) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
    """Show updates as a bar on a terminal, and finished runs as lines; yields what to call after an update, and with a line."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal or not num_updates:
        yield lambda: None, say
        return
    with Progress("updates", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=num_updates)
        yield lambda: bar.advance(task), lambda text: bar.console.print(text, highlight=False)


def finish(results: dict[Run, dict[str, Any]], targets: dict[str, Target], out: Path, pictures: bool) -> None:
    """Write the summary and the pictures; print the table and where they are."""
    import torch
    from rich.console import Console

    from dist_vsd.lab.runs import write_json
    from dist_vsd.lab.summary import summarise, table_of
    from dist_vsd.scaling.machine import Places, commit_of_package, describe_machine

    machine = describe_machine(Places.of_this_machine(0))
    record = {"commit": commit_of_package(), "machine": machine, "torch": torch.__version__} | summarise(results, targets)
    write_json(record, out / SUMMARY)
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table_of(record))
    print(f"table:   {out / SUMMARY}")
    for file in draw(results, targets, record, out) if pictures else ():
        print(f"picture: {file}")


def draw(results: dict[Run, dict[str, Any]], targets: dict[str, Target], record: dict[str, Any], out: Path) -> list[Path]:
    """Draw the first seed's runs on each mixture, if matplotlib is installed; return the pictures."""
    try:
        from dist_vsd.lab.pictures import Shown, draw_comparison
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        say("no pictures: matplotlib is not installed, `pip install dist_vsd[bench]` installs it")
        return []
    from dist_vsd.lab.runs import mixture_name, read_metrics, read_trajectory
    from dist_vsd.lab.summary import FRESH, process_label

    process, first_seed = process_label(record["settings"]), next(iter(results)).seed
    files = []
    for mixture, target in targets.items():
        shown = [
            Shown(run.variant, *read_trajectory(folder_of(run, out)), read_metrics(folder_of(run, out)))
            for run in results
            if run.mixture == mixture and run.seed == first_seed
        ]
        name = mixture_name(mixture)
        fresh = next(row["figures"] for row in record["rows"] if row["mixture"] == name and row["label"] == FRESH)
        axes = ", the first two coordinates" if target.prior.num_dimensions > 2 else ""
        particles = f"{shown[0].theta.shape[1]} particles in {target.prior.num_dimensions} dimensions{axes}"
        title = f"{name}: {particles}, {process}, seed {first_seed}"
        files.append(out / f"{name}.png")
        draw_comparison(shown, target.prior, fresh.get("energy_distance", {}).get("mean"), title, files[-1])
    return files


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)
