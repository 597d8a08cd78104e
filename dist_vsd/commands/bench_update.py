"""`dist-vsd bench update`: what one update costs on this machine, and beside it the published way."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vsd.commands.arguments import parse
from dist_vsd.commands.bench_output import BUSY_CORES, busy_sentence, say, split_words, write
from dist_vsd.commands.train_words import parse_words
from dist_vsd.config import PRECISIONS, RunConfig, flag, nearest
from dist_vsd.priors.architecture_names import PREFIX, SIZES, is_tiny, preset_of, sizes_of_pictures
from dist_vsd.priors.attention_names import ATTENTIONS, require_attention
from dist_vsd.priors.compile_names import COMPILES, require_compile
from dist_vsd.priors.table import prior_row
from dist_vsd.writable import require_writable_file

if TYPE_CHECKING:
    import torch

    from dist_vsd.scaling.update_bench import Way

UPDATE = """Time one update on this machine and count what it is made of: particle-updates a second, milliseconds by stage, operations
and bytes, the share of the machine's own measured peaks, peak memory.

--size embedded is the prior that ships; sd15, sd21, sdxl, sd3-medium, sd35-medium and sd35-large are Stable Diffusion's architectures at
their real sizes with random weights, built offline: time and memory don't depend on the weights. --as-published adds the same update the
way thu-ml/prolificdreamer and threestudio make it, in the same run, and says what differs from the originals.

--count-only counts on shapes alone, at any size on any machine.

Words after -- go to train: dist-vsd bench update --size sd21 -- --score.reuse-pass"""
EMBEDDED = "embedded"
RESULTS_FILE, PLOT_FILE = "update.json", "update.png"
PROMPT = "a green duck"
# What bench decides itself, and what a user changes instead.
OWN_FLAGS = {
    "--num-particles": "--num-particles before the --", "--render-size": "--render-size before the --",
    "--precision": "--precision before the --", "--attention": "--attention before the --",
    "--compile": "--compile before the --", "--prior": "--size",
    **dict.fromkeys(("--run-dir", "--resume", "--dry-run", "--num-updates", "--prompt", "--prompt-file"), "nothing: no run is made"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateArguments:
    """What `bench update` takes."""

    size: str = EMBEDDED
    """embedded, or an architecture with random weights: sd15, sd21, sdxl, sd3-medium, sd35-medium, sd35-large, or tiny and tiny-sd3."""
    preset: str = ""
    """Where the other values come from; empty: stable-diffusion or stable-diffusion-3 for their sizes, embedded for others."""
    num_particles: int = 1
    """Particles of an update."""
    render_size: int = 0
    """Height and width of a render, pixels; 0: what the prior wants."""
    precision: str = ""
    """Of the frozen networks: fp32, bf16 or fp16; empty: bf16 on a GPU and where it is only counted, fp32 on a CPU."""
    attention: str = "sdpa"
    """What computes the prior's attention: sdpa, xformers or flash."""
    compile: str = "off"
    """How the frozen networks are compiled: off, regions or graphs."""
    num_updates: int = 10
    """Updates that count."""
    num_warmup: int = 3
    """Updates before them."""
    as_published: bool = False
    """Add the same update the way thu-ml and threestudio make it."""
    count_only: bool = False
    """Count operations and bytes on shapes alone: no machine is measured."""
    out: str = "bench"
    """Folder for update.json and update.png."""

    def __post_init__(self) -> None:
        for name in ("num_particles", "num_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {getattr(self, name)}: raise it")
        for name in ("render_size", "num_warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{flag(name)} must be 0 or more, got {getattr(self, name)}: raise it")
        named = {"size": (EMBEDDED, *SIZES), "precision": PRECISIONS, "attention": ATTENTIONS, "compile": COMPILES}
        for name, choices in named.items():
            value = getattr(self, name)
            if value not in choices:
                listed = ", ".join(filter(None, choices))
                raise ValueError(f"{flag(name)} must be one of {listed}, got {value!r}{nearest(value, choices)}: change it")


def run_update(arguments: list[str]) -> int:
    """Measure one update; print the table and write JSON and plot."""
    own, train_words = split_words(arguments)
    parsed = parse(UpdateArguments, own, "bench update", UPDATE)
    check(parsed, train_words)

    import torch

    from dist_vsd.device import best_device
    from dist_vsd.scaling.as_published import DIFFERS, published_ways
    from dist_vsd.scaling.machine import OtherPrograms, Places, commit_of_package, describe_machine
    from dist_vsd.scaling.peaks import measure_peaks
    from dist_vsd.scaling.update_bench import Way, count_way, measure_way
    from dist_vsd.training.state import DTYPES

    device = torch.device("meta") if parsed.count_only else best_device()
    config = configuration(parsed, train_words, device)
    ways = [Way(name="dist_vsd", config=config)]
    if parsed.as_published:
        ways += published_ways(config, can_fp16=device.type != "cpu", has_real_size=has_real_size(parsed.size))
    others, peaks, rows = OtherPrograms(), {}, []
    for precision in dict.fromkeys(way.config.precision for way in ways) if not parsed.count_only else ():
        peaks[precision] = measure_peaks(device, DTYPES[precision])
    for way in ways:
        say(f"{way.name}: {_doing(parsed, way)}")
        if parsed.count_only:
            rows.append(count_way(way))
        else:
            rows.append(measure_way(way, device, parsed.num_updates, parsed.num_warmup, peaks[way.config.precision]))
    record = {
        "commit": commit_of_package(),
        "machine": None if parsed.count_only else describe_machine(Places.of_this_machine(torch.cuda.device_count())),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "size": parsed.size,
        "train_words": list(train_words),
        "num_updates": parsed.num_updates,
        "cores_used_by_other_programs": others.cores(),
        "peaks": {precision: dataclasses.asdict(peak) for precision, peak in peaks.items()},
        "rows": rows,
        "differs_from_the_originals": list(DIFFERS) if parsed.as_published else [],
    }
    out = Path(parsed.out)
    write(record, out / RESULTS_FILE, show, "plot_update", out / PLOT_FILE)
    return 0


def _doing(parsed: UpdateArguments, way: Way) -> str:
    updates = f"{parsed.num_warmup} + 2 x {parsed.num_updates} updates of {way.particles_per_update} particle(s)"
    return "counting" if parsed.count_only else updates


def check(parsed: UpdateArguments, train_words: tuple[str, ...]) -> None:
    """Refuse what can't be measured, before anything is done; ValueError in one line."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("bench update measures one process, and was started by a launcher on several: run it without the launcher")
    for word in train_words:
        name = word.partition("=")[0].replace("_", "-")
        if name in OWN_FLAGS:
            raise ValueError(f"{name} can't stand after --, bench sets it: use {OWN_FLAGS[name]}")
    if parsed.precision == "fp16" and not parsed.count_only:
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--precision fp16 needs a GPU: use fp32 or bf16, or --count-only")
    config = words_to_config(parsed, train_words, parsed.precision or "bf16")
    if parsed.as_published and config.objective != "vsd":
        raise ValueError(f"--as-published is VSD's update, got objective {config.objective}: drop one of them")
    row = prior_row(config.prior)
    row.check(config.prior, config.texts, flow=config.flow)
    if parsed.as_published and row.is_flow:
        raise ValueError(f"--as-published is the update of Stable Diffusion 2.1 and XL, got --size {parsed.size}: drop one of them")
    if not parsed.count_only:
        require_attention(parsed.attention, parsed.precision or "bf16", row.attentions)
        require_compile(parsed.compile, config.deterministic, row.compiles)
    for name in (RESULTS_FILE, PLOT_FILE):
        require_writable_file(Path(parsed.out, name), f"--out {parsed.out!r}")


def has_real_size(size: str) -> bool:
    """Say whether a size is a Stable Diffusion's."""
    return size != EMBEDDED and not is_tiny(size)


def words_to_config(parsed: UpdateArguments, train_words: tuple[str, ...], precision: str) -> RunConfig:
    """Return the configuration that the words of `bench update` and those for train lead to."""
    preset = parsed.preset or (preset_of(parsed.size) if has_real_size(parsed.size) else "embedded")
    prior = EMBEDDED if parsed.size == EMBEDDED else PREFIX + parsed.size
    size = parsed.render_size or (64 if parsed.size == EMBEDDED else sizes_of_pictures(parsed.size))
    own = ["--preset", preset, "--prior", prior, "--num-particles", str(parsed.num_particles), "--render-size", str(size)]
    # A preset's own choice of micro-batches is for a GPU of any size; here all particles go together unless told otherwise.
    own += ["--precision", precision, "--micro-batch-size", str(parsed.num_particles), "--num-views", "1"]
    # On shapes alone no kernel is chosen.
    own += [] if parsed.count_only else ["--attention", parsed.attention, "--compile", parsed.compile]
    return parse_words([PROMPT, *own, *train_words]).run


def configuration(parsed: UpdateArguments, train_words: tuple[str, ...], device: torch.device) -> RunConfig:
    """Return the configuration on a device, whose precision is chosen where it is not given."""
    return words_to_config(parsed, train_words, parsed.precision or ("fp32" if device.type == "cpu" else "bf16"))


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def show(record: dict[str, Any]) -> None:
    """Print a column a way."""
    rows, peaks = record["rows"], record["peaks"]
    lines: dict[str, list[str]] = {"": [row["name"] for row in rows]}
    lines["particles an update"] = [str(row["particles_per_update"]) for row in rows]
    lines["precision"] = [row["precision"] for row in rows]
    if peaks:
        lines["ms an update"] = [f"{1e3 * row['seconds_per_update']:.1f}" for row in rows]
        lines["particle-updates/s"] = [f"{row['particle_updates_per_second']:.3g}" for row in rows]
        for stage in rows[0]["stage_ms"]:
            lines[f"ms of {stage}"] = [f"{row['stage_ms'][stage]:.1f}" for row in rows]
        lines["s of compiling"] = [f"{row['compiling']['seconds']:.1f}" for row in rows]
        lines["regions compiled, found"] = [f"{row['compiling']['compiled']}, {row['compiling']['found']}" for row in rows]
        lines["peak memory, MiB"] = [f"{row['peak_memory_mib']:,.0f}" for row in rows]
    lines["GFLOP"] = [_rounded(row["flop"] / 1e9) for row in rows]
    lines["GiB read and written, unfused"] = [_rounded(row["bytes"] / 2**30) for row in rows]
    lines["operations"] = [f"{row['num_operations']:,}" for row in rows]
    if peaks:
        lines["of the matmul peak"] = [f"{row['share_of_matmul_peak']:.1%}" for row in rows]
        lines["of the copy peak"] = [f"{row['share_of_copy_peak']:.1%}" for row in rows]
    width = max(map(len, lines))
    for name, cells in lines.items():
        print(f"{name:<{width}}  " + "  ".join(f"{cell:>12}" for cell in cells))
    for precision, peak in peaks.items():
        matmul, copy, where = peak["matmul_flop_per_second"], peak["copy_bytes_per_second"], record["gpu"] or record["machine"]
        print(f"this machine in {precision}: {matmul / 1e12:.3g} TFLOP/s in products, {copy / 1e9:.3g} GB/s in copies; {where}")
    others = record["cores_used_by_other_programs"]
    if peaks and others is not None and others > BUSY_CORES:
        print(busy_sentence(others))
    for note in {note: None for row in rows for note in row["notes"]}:
        print(f"note: {note}")
    for difference in record["differs_from_the_originals"]:
        print(f"not as the originals: {difference}")
