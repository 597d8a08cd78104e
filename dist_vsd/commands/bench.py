"""`dist-vsd bench scaling`: time real runs on several numbers of ranks; `bench update` stands in bench_update.py."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vsd.commands.arguments import nearest_command, parse
from dist_vsd.commands.bench_output import BUSY_CORES, busy_sentence, say, split_words, write
from dist_vsd.commands.bench_update import run_update
from dist_vsd.config import flag
from dist_vsd.config_files import DEFAULT_PRESET, load_preset
from dist_vsd.priors.pipeline_folder import find_pipeline
from dist_vsd.priors.prompts import check_prompts
from dist_vsd.writable import require_writable_file

if TYPE_CHECKING:
    from rich.table import Table

    from dist_vsd.scaling.machine import Places
    from dist_vsd.scaling.measure import Job, RunSizes, Settings, Timing

HELP = """usage: dist-vsd bench scaling | update [OPTIONS] [-- TRAIN OPTIONS]

  scaling   seconds, bytes sent and memory of an update on 1, 2, 4 ranks: weak and strong scaling
  update    one update at any size: time by stage, operations, bytes, shares of the machine's peaks; beside it the published way
"""
SCALING = """Time real runs of `train` on several numbers of ranks.

weak scaling: every rank has --particles-per-rank particles; more ranks, more particles. Efficiency T_1 / T_W.

strong scaling: --strong-particles in all, spread over the ranks. Efficiency T_1 / (W T_W).

control: W runs of one rank at the same time that know nothing of each other. One rank alone has the memory bandwidth,
the caches and the clock of the whole machine to itself; the control shows what is lost by sharing them, so that the rest
is what synchronisation costs.

Each rank has one thread and a core of its own (on a machine with GPUs: a GPU). Rows with more ranks than cores are marked
"ranks share cores": they show that it runs, they do not measure scaling. Runs are interleaved (1, 2, 4, 1, 2, 4, ...) and an
efficiency is the median of the ratios within a repeat, so that a busy spell of the machine hits all of them.

Words after -- go to train: dist-vsd bench scaling --ranks 1 2 -- --field.num-samples 32"""
# What bench decides for every run itself, and what a user changes instead.
OWN_FLAGS = {
    "--num-particles": "--particles-per-rank and --strong-particles",
    "--num-updates": "bench's own --num-updates, before the --",
    "--preset": "bench's own --preset, before the --",
    "--prior": "bench's own --prior, before the --",
    "--prompt": "bench's own --prompt, before the --",
    "--prompt-file": "bench's own --prompt, before the --",
    **dict.fromkeys(("--run-dir", "--resume", "--dry-run", "--log-every"), "nothing: its runs are temporary"),
    **dict.fromkeys(("--checkpoint-every", "--check-every", "--preview-every"), "nothing: its runs do that after the last update"),
}
RESULTS_FILE, PLOT_FILE = "scaling.json", "scaling.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingArguments:
    """What `bench scaling` takes."""

    preset: str = DEFAULT_PRESET
    """Where the values of the runs come from; `dist-vsd info` lists the presets."""
    prior: str = ""
    """embedded, the path of a StableDiffusionPipeline folder, or a hub id; empty: the preset's."""
    prompt: str = "a green duck"
    """Of all runs."""
    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of ranks; 1 must be among them, since the others are compared with it."""
    particles_per_rank: int = 1
    """Of weak scaling."""
    strong_particles: int = 4
    """Of strong scaling, in all: at least the most ranks, so that each has one of its own; 0 leaves strong scaling out."""
    num_updates: int = 40
    """Updates of each run."""
    num_warmup: int = 10
    """First updates of each run that are not counted: allocators and caches settle."""
    repeats: int = 3
    """Times that every run is made; three or more show how much the machine's noise matters."""
    out: str = "bench"
    """Folder for scaling.json and scaling.png."""

    def __post_init__(self) -> None:
        if any(w < 1 for w in self.ranks) or len(set(self.ranks)) != len(self.ranks):
            raise ValueError(f"--ranks must be numbers of at least 1, each once, got {' '.join(map(str, self.ranks))}")
        if 1 not in self.ranks:
            raise ValueError(f"--ranks must hold 1, with which the others are compared, got {' '.join(map(str, self.ranks))}: add 1")
        for name in ("particles_per_rank", "num_updates", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {getattr(self, name)}: raise it")
        if not 0 <= self.num_warmup < self.num_updates:
            raise ValueError(
                f"--num-warmup must be 0 or more and below --num-updates, got {self.num_warmup} of {self.num_updates}: change one"
            )
        if self.strong_particles != 0 and self.strong_particles < max(self.ranks):
            raise ValueError(
                f"--strong-particles must be at least the most ranks, {max(self.ranks)}, or 0 for no strong scaling, "
                f"got {self.strong_particles}: change it or --ranks"
            )


def run(arguments: list[str]) -> int:
    """Run the command; see cli.main for the exit codes."""
    actions = {"scaling": run_scaling, "update": run_update}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if arguments[0] not in actions:
        raise ValueError(f"bench {arguments[0]!r} does not exist{nearest_command(arguments[0], actions)}: use {', '.join(actions)}")
    return actions[arguments[0]](arguments[1:])


def run_scaling(arguments: list[str]) -> int:
    """Measure weak and strong scaling; print the table and write JSON and plot."""
    own, train_words = split_words(arguments)
    parsed = parse(ScalingArguments, own, "bench scaling", SCALING)
    check(parsed, train_words)
    out = Path(parsed.out)

    import torch

    from dist_vsd.scaling.efficiency import comparisons, jobs_of, make_rows, weak_efficiency
    from dist_vsd.scaling.machine import OtherPrograms, Places, commit_of_package, describe_machine
    from dist_vsd.scaling.measure import Settings

    places = Places.of_this_machine(torch.cuda.device_count())
    if places.kind == "GPU" and max(parsed.ranks) > len(places.ids):
        raise ValueError(f"--ranks must be at most the GPUs here, {len(places.ids)}, got {max(parsed.ranks)}: lower it")
    words = ("--preset", parsed.preset, *(("--prior", parsed.prior) if parsed.prior else ()), *train_words)
    settings = Settings(prompt=parsed.prompt, words=words, num_updates=parsed.num_updates, num_warmup=parsed.num_warmup)
    compared = comparisons(parsed.ranks, parsed.particles_per_rank, parsed.strong_particles, len(places.ids))
    others = OtherPrograms()
    timings, sizes = time_all(jobs_of(compared), settings, places, parsed.repeats)
    rows = make_rows(compared, timings, sizes, settings, len(places.ids))
    record = {
        "commit": commit_of_package(),
        "machine": describe_machine(places),
        "torch": torch.__version__,
        "preset": parsed.preset,
        "train_words": list(train_words),
        "cores_used_by_other_programs": others.cores(),
        "rows": rows,
        "weak_efficiency": weak_efficiency(rows),
    }
    write(record, out / RESULTS_FILE, show, "plot_scaling", out / PLOT_FILE)
    return 0


def check(parsed: ScalingArguments, train_words: tuple[str, ...]) -> None:
    """Refuse what can't be measured, before anything is run; ``train`` itself checks its words when the first run starts.

    Raises:
        ValueError: with one line.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("bench starts its ranks itself, and was started by a launcher on several: run it without the launcher")
    for word in train_words:
        name = word.partition("=")[0].replace("_", "-")
        if name in OWN_FLAGS:
            raise ValueError(f"{name} can't stand after --, bench sets it for each run: use {OWN_FLAGS[name]}")
    preset = load_preset(parsed.preset)
    check_prompts([parsed.prompt], find_pipeline(parsed.prior or preset.prior))
    for name in (RESULTS_FILE, PLOT_FILE):
        require_writable_file(Path(parsed.out, name), f"--out {parsed.out!r}")


def time_all(jobs: list[Job], settings: Settings, places: Places, repeats: int) -> tuple[dict[Job, list[Timing]], dict[Job, RunSizes]]:
    """Run every job of every repeat, interleaved, in a folder that is removed afterwards.

    Returns:
        By job: its timings, one a repeat; and its sizes.
    """
    from dist_vsd.scaling.measure import run_job

    timings: dict[Job, list[Timing]] = {job: [] for job in jobs}
    sizes: dict[Job, RunSizes] = {}
    schedule = [job for _ in range(repeats) for job in jobs]
    with tempfile.TemporaryDirectory(prefix="dist_vsd_bench_") as folder:
        say(f"{len(schedule)} runs of {settings.num_updates} updates")
        for index, job in enumerate(schedule):
            timing, sizes[job] = run_job(job, settings, places, Path(folder) / f"{index:04d}")
            timings[job].append(timing)
            say(f"run {index + 1}/{len(schedule)}: {job}: {timing.seconds_per_update:.3f} s an update")
    return timings, sizes


def show(record: dict[str, Any]) -> None:
    """Print the table, and what weak scaling loses to what."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file or a pipe: no line to break
    console.print(scaling_table(record))
    for num_ranks, weak in record["weak_efficiency"].items():
        console.print(weak_sentence(num_ranks, weak), highlight=False)
    others = record["cores_used_by_other_programs"]
    if others is not None and others > BUSY_CORES:
        console.print(busy_sentence(others))


def scaling_table(record: dict[str, Any]) -> Table:
    """Return the rows as a table: medians over repeats; efficiencies with their range."""
    from rich.table import Table

    made_of = [record["machine"], f"torch {record['torch']}", f"commit {record['commit']}" if record["commit"] else ""]
    table = Table(title="one update on one rank", caption=", ".join(filter(None, made_of)), caption_justify="left")
    stages = list(record["rows"][0]["stages"])
    for name in ("", "ranks", "particles", "seconds", *stages, "sent MiB", "memory MiB", "efficiency"):
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name))
    table.add_column("")
    for row in record["rows"]:
        runs = row["num_runs"]
        sent, memory = row["sent_bytes_per_update"], row["peak_memory_mib"]
        ratios = [repeat["efficiency"] for repeat in row["repeats"]]
        is_reference = row["num_ranks"] == runs == 1
        spread = "1" if is_reference else f"{row['efficiency']:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        table.add_row(
            row["mode"],
            str(row["num_ranks"]) if runs == 1 else f"{runs} x {row['num_ranks']}",
            str(row["num_particles"]) if runs == 1 else f"{runs} x {row['num_particles']}",
            f"{row['seconds_per_update']:.3f}",
            *(f"{seconds:.3f}" for seconds in row["stages"].values()),
            "-" if sent is None else f"{sent / 2**20:.2f}",
            "-" if memory is None else f"{memory:.0f}",
            spread,
            "ranks share cores" if row["cores_shared"] else "",
        )
    return table


def weak_sentence(num_ranks: str, weak: dict[str, Any]) -> str:
    """Say what weak scaling on some ranks loses to what."""
    plain = f"weak scaling, {num_ranks} ranks: efficiency {weak['plain']:.2f}"
    if weak["cores_shared"]:
        return f"{plain}, but ranks share cores: not a measurement of scaling"
    alone, kept = weak["control"], weak["synchronisation"]
    return f"{plain}; {num_ranks} independent runs at once keep {alone:.2f}, and synchronisation {kept:.2f} of that"
