"""`dist-vsd plan`: what a run would take on a cluster, foretold before it is asked for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from dist_vsd.commands.arguments import parse
from dist_vsd.commands.help import Pages
from dist_vsd.config import RunConfig, nearest
from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.priors.architecture_names import PREFIX, SIZES, is_tiny, preset_of, sizes_of_pictures
from dist_vsd.priors.table import prior_row
from dist_vsd.scaling.cost_model import (
    Cluster,
    Link,
    Peak,
    UpdateCost,
    average_renders,
    most_particles,
    most_renders,
    node_hours,
    rank_memory_bytes,
    update_cost,
)
from dist_vsd.scaling.stage_times import ASSUMED_RENDER_MS, H100_TFLOPS, StageTimes, counted, counted_of, read_measured
from dist_vsd.writable import require_writable_file

REAL_SIZES = ("sd21", *(size for size in SIZES if size != "sd21" and not is_tiny(size)))  # the first one has constants
MOST_RANKS, MOST = 10**6, 10**9
MIB, GIB = 2**20, 2**30
DESCRIPTION = """Foretell seconds, communication, memory and node-hours of a run on a cluster. Nothing runs; no GPU is needed.

  dist-vsd plan --nodes 64 --gpus 8 --num-particles 2048             one scale, in detail
  dist-vsd plan --nodes 1 8 64 128 --particles-per-rank 4            several: the same work on each GPU (weak scaling)
  dist-vsd plan --nodes 1 8 64 128 --num-particles 2048              several: the same particles in all (strong scaling)
  dist-vsd plan --nodes 64 --num-particles 2048 --measured FILE      with stage times of your GPU, by `dist-vsd bench scaling`
  dist-vsd plan --nodes 64 --num-particles 2048 --measured RUN_DIR   or by a run of yours on one rank
  dist-vsd plan --nodes 64 --num-particles 2048 --prompt-file FILE   node-hours of a sweep

Without --measured, the networks' times are Stable Diffusion's counted work over --gpu-tflops, and the field's is --render-ms, an
assumption: good for shares and trends, not for seconds.

Assumed: rings inside a node and then between nodes, over each node's one link; stage times linear in the renders;
ranks alike, no stragglers; no time for starting, checkpoints and previews. dist_vsd/scaling/cost_model.py has the formulas."""
PAGES = Pages(
    examples="""Foretell seconds, communication, memory and node-hours of a run on a cluster. Nothing runs; no GPU is needed.

  dist-vsd plan --nodes 64 --gpus 8 --num-particles 2048             one scale, in detail
  dist-vsd plan --nodes 1 8 64 128 --particles-per-rank 4            several, a row each
  dist-vsd plan --nodes 64 --num-particles 2048 --measured RUN_DIR   with stage times of yours""",
    everyday=(
        "--nodes", "--gpus", "--num-particles", "--particles-per-rank", "--num-updates", "--prompt-file", "--size", "--measured",
        "--bandwidth-gbit", "--json",
    ),
    topics={
        "The cluster": (
            "--nodes", "--gpus", "--bandwidth-gbit", "--latency-us", "--intra-bandwidth-gbit", "--intra-latency-us", "--overlap",
        ),
        "The run": (
            "--num-particles", "--particles-per-rank", "--num-views", "--num-shards", "--micro-batch-size", "--steps-per-update",
            "--num-updates", "--prompt-file", "--offload",
        ),
        "What an update takes": ("--size", "--measured", "--gpu-tflops", "--render-ms", "--activations-mib"),
        "Output": ("--json",),
    },
)  # fmt: skip
COLUMNS = (
    "nodes", "ranks", "particles", "shards x views", "s/update", "updates/s", "particle-up./s", "comm. %", "efficiency", "GiB", "node-hours"
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """What `plan` takes."""

    nodes: tuple[int, ...] = (1,)
    """Nodes; several numbers make a table with a row for each."""
    gpus: int = 8
    """GPUs of a node, a rank on each."""
    num_particles: int | None = None
    """Particles, over all ranks together. With fewer than ranks, several ranks share a particle and split its views."""
    particles_per_rank: int | None = None
    """Instead of --num-particles: particles on each rank, at every scale (1 if neither is given)."""
    num_views: int = 0
    """Views of each particle in an update, over the ranks that share it; 0: one a rank."""
    num_shards: int = 0
    """Disjoint sets of particles; 0: as many as fit."""
    micro_batch_size: int = 1
    """Renders of a rank that pass through the networks together: activations grow with it (speed is not modelled)."""
    steps_per_update: int = 1
    """Steps of phi in an update, each with a reduction over all ranks."""
    num_updates: int = 25_000
    """Updates of a prompt."""
    prompt_file: str = ""
    """A text file with a prompt a line, run one after another on all nodes; empty: one prompt."""
    offload: bool = False
    """Idle particles wait in host memory: two micro-batches are on the GPU (the copies are taken to be hidden)."""
    size: str = "sd21"
    """Whose work and memory are counted, without --measured: sd15, sd21 or sdxl, or a rectified flow, sd3-medium, sd35-medium or
    sd35-large, at 512 px (XL: 1024)."""
    measured: str = ""
    """Stage times: JSON of `dist-vsd bench scaling`, or a run directory; empty: counted work of Stable Diffusion."""
    gpu_tflops: float | None = None
    """Sustained TFLOP/s of a GPU in the networks, without --measured; 87 by default (an H100 in plain PyTorch, as published)."""
    render_ms: float | None = None
    """Milliseconds of g(theta, c) at 512 px, without --measured; its gradient takes twice that. 120 by default, an ASSUMPTION (about
    what the published 9 hours for 70,000 updates on an RTX 4090 leave for it): measure yours."""
    activations_mib: float | None = None
    """MiB that one render holds on its way through the networks; not known by default, or from --measured."""
    bandwidth_gbit: float = 400.0
    """Gbit/s of a node to the others, one direction, shared by its GPUs."""
    latency_us: float = 5.0
    """Microseconds of a message between nodes."""
    intra_bandwidth_gbit: float = 3600.0
    """Gbit/s of a GPU to another in its node, one direction (NVLink 4: 3600)."""
    intra_latency_us: float = 3.0
    """Microseconds of a message inside a node."""
    overlap: float = 0.0
    """Share of phi's reduction that runs behind the backward pass that makes it, 0..1; 0: none, as with gloo. DDP hides some."""
    json: str = ""
    """Write the same as JSON to this file; - for the terminal, instead of the text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """What is foretold for one number of nodes.

    Attributes:
        cost: of one update.
        memory: bytes of the fullest rank, by what holds them.
        node_hours: of all prompts.
        times: of the stages, and their source.
        run: whose memory is counted; None where it is not known.
        peak: memory of a GPU at the peak of its update, counted on shapes alone.
    """

    cost: UpdateCost
    memory: dict[str, float | None]
    node_hours: float
    times: StageTimes
    run: RunConfig | None
    peak: Peak | None


def run(arguments: list[str]) -> int:
    """Run the command; see cli.main for the exit codes."""
    parsed = parse(PlanArguments, arguments, "plan", DESCRIPTION, pages=PAGES)
    check(parsed)
    if parsed.json not in ("", "-"):
        require_writable_file(Path(parsed.json), f"--json {parsed.json!r}")
    num_prompts = count_prompts(parsed.prompt_file) if parsed.prompt_file else 1
    scales = [foretell(parsed, num_nodes, num_prompts) for num_nodes in parsed.nodes]
    if parsed.json == "-":
        print(as_json(parsed, num_prompts, scales), end="")
        return 0
    if parsed.json:
        write(Path(parsed.json), as_json(parsed, num_prompts, scales))
    print(one_scale(parsed, num_prompts, scales[0]) if len(scales) == 1 else several_scales(parsed, num_prompts, scales))
    if parsed.json:
        print(f"the same as JSON: {parsed.json}")
    return 0


def write(file: Path, text: str) -> None:
    """Write a file, with its folder; ValueError if it can't be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    except OSError as error:
        raise ValueError(f"--json {str(file)[:100]} can't be written ({error.strerror}): choose another file") from error


def check(parsed: PlanArguments) -> None:
    """Refuse values out of range; ValueError says the rule, the value and what to change."""
    if not parsed.nodes:
        raise ValueError("--nodes must name at least one number of nodes: give one, as in --nodes 8")
    counts = {"gpus": parsed.gpus, "micro_batch_size": parsed.micro_batch_size, "steps_per_update": parsed.steps_per_update}
    counts |= {"num_updates": parsed.num_updates} | {f"nodes ({number})": number for number in parsed.nodes}
    counts |= {name: getattr(parsed, name) for name in ("num_particles", "particles_per_rank") if getattr(parsed, name) is not None}
    least = dict.fromkeys(counts, 1) | {"num_views": 0, "num_shards": 0}
    for name, value in (counts | {"num_views": parsed.num_views, "num_shards": parsed.num_shards}).items():
        option = "--" + name.split()[0].replace("_", "-")
        if not least[name] <= value <= MOST:
            raise ValueError(f"{option} must be {least[name]} to {MOST:,}, got {value}: change {option}")
    for number in parsed.nodes:
        if number * parsed.gpus > MOST_RANKS:
            raise ValueError(f"nodes x GPUs must be at most {MOST_RANKS:,} ranks, got {number} x {parsed.gpus}: lower --nodes or --gpus")
    if parsed.num_particles is not None and parsed.particles_per_rank is not None:
        raise ValueError("--num-particles is over all ranks, --particles-per-rank on each: give one of them")
    ranges = dict.fromkeys(("gpu_tflops", "bandwidth_gbit", "intra_bandwidth_gbit"), (1e-6, 1e9)) | {"overlap": (0.0, 1.0)}
    ranges |= dict.fromkeys(("render_ms", "activations_mib", "latency_us", "intra_latency_us"), (0.0, 1e9))
    for name, (low, high) in ranges.items():
        value, option = getattr(parsed, name), "--" + name.replace("_", "-")
        if value is not None and not low <= value <= high:  # NaN is outside of every range
            raise ValueError(f"{option} must be {low:g} to {high:g}, got {value}: change {option}")
    if parsed.size not in REAL_SIZES:
        raise ValueError(
            f"--size must be one of {', '.join(REAL_SIZES)}, got {parsed.size!r}{nearest(parsed.size, REAL_SIZES)}: change --size"
        )
    if parsed.measured and parsed.size != REAL_SIZES[0]:
        raise ValueError("--measured says what was run, --size what is counted instead: drop one of them")
    if parsed.measured and (parsed.gpu_tflops is not None or parsed.render_ms is not None):
        raise ValueError("--measured holds the stage times, --gpu-tflops and --render-ms assume them: drop --measured or the others")


def count_prompts(file: str) -> int:
    """Return the prompts of a file, one on each line that is not blank."""
    try:
        num_prompts = sum(bool(line.strip()) for line in Path(file).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt-file {file} can't be read ({type(error).__name__}): check the path") from error
    if not num_prompts:
        raise ValueError(f"--prompt-file must hold a prompt a line, {file} has none: write some into it")
    return num_prompts


def foretell(parsed: PlanArguments, num_nodes: int, num_prompts: int) -> Scale:
    """Return what is foretold for a number of nodes."""
    from dist_vsd.scaling.counted_memory import count_peak  # imports the networks' libraries, which a question for help need not

    inside = Link.of(parsed.intra_bandwidth_gbit, parsed.intra_latency_us)
    cluster = Cluster(num_nodes, parsed.gpus, inside, Link.of(parsed.bandwidth_gbit, parsed.latency_us))
    num_particles = parsed.num_particles or (parsed.particles_per_rank or 1) * cluster.num_ranks
    layout = Layout.of(num_particles, cluster.num_ranks, 0, parsed.num_views, parsed.num_shards)
    if parsed.measured:
        times = read_measured(Path(parsed.measured), average_renders(layout))
    else:
        render_ms = ASSUMED_RENDER_MS if parsed.render_ms is None else parsed.render_ms
        rates = (parsed.gpu_tflops or H100_TFLOPS, render_ms)
        times = counted(*rates) if parsed.size == REAL_SIZES[0] else counted_of(parsed.size, *rates)
    sizes = times.sizes
    if parsed.activations_mib is not None:
        sizes = dataclasses.replace(sizes, render_bytes=parsed.activations_mib * MIB)
    cost = update_cost(layout, cluster, times.stages, sizes, parsed.steps_per_update, parsed.overlap, times.fixed)
    memory = rank_memory_bytes(layout, sizes, parsed.micro_batch_size, parsed.offload)
    hours = node_hours(num_nodes, cost.seconds, parsed.num_updates, num_prompts)
    planned = planned_run(parsed)
    peak = count_peak(planned, layout) if planned is not None else None
    return Scale(cost=cost, memory=memory, node_hours=hours, times=dataclasses.replace(times, sizes=sizes), run=planned, peak=peak)


def planned_run(parsed: PlanArguments) -> RunConfig | None:
    """Return the run whose memory is counted: the measured one, or the preset whose times are counted; None for a file of measurements."""
    from dist_vsd.runs.run_directory import RunDirectory

    if not parsed.measured:
        settings: dict[str, Any] = {"prompt": "a prompt", "prior": PREFIX + parsed.size, "render_size": sizes_of_pictures(parsed.size)}
        config = merge(load_preset(preset_of(parsed.size)), settings, "plan")
    elif (saved := RunDirectory(Path(parsed.measured)).saved_config()) is not None:
        config = merge(RunConfig(), saved | {"resume": False, "stages": {}}, parsed.measured)
        try:
            prior_row(config.prior).check(config.prior, [], config.score.prior, config.flow)
        except ValueError:  # a run of another machine, whose prior is not here
            return None
    else:
        return None
    particles = dataclasses.replace(config.particles, offload=parsed.offload)
    return dataclasses.replace(config, micro_batch_size=parsed.micro_batch_size, particles=particles)


def one_scale(parsed: PlanArguments, num_prompts: int, scale: Scale) -> str:
    """Return the text for one number of nodes."""
    from dist_vsd.scaling.room import cards_in_words

    cost, layout, cluster = scale.cost, scale.cost.layout, scale.cost.cluster
    renders, least = most_renders(layout), layout.num_particles // layout.num_shards
    dealt = f"{most_particles(layout)}" if least == most_particles(layout) else f"{least} or {most_particles(layout)}"
    parts = [(name, getattr(cost, name)) for name in ("render", "scores", "backward", "phi", "other", "imbalance")]
    parts += [("theta reduction", cost.theta_reduction), ("phi reduction", cost.phi_reduction), ("agreement", cost.agreement)]
    lines = [
        f"stage times: {scale.times.source}",
        f"layout: {layout.num_particles} particle(s) on {cluster.num_nodes} node(s) x {cluster.gpus_per_node} GPU(s): "
        f"{layout.num_shards} shard(s) x {layout.view_ranks} view rank(s)",
        f"  a rank has {dealt} particle(s), {layout.num_views // layout.view_ranks} view(s) of each: up to {renders} render(s) an update",
        "seconds of an update (compute of an average rank; imbalance: what the fullest rank takes longer):",
        *(f"  {name:<18}{seconds:12.6f}  {100 * seconds / cost.seconds:5.1f} %" for name, seconds in parts),
        f"  {'total':<18}{cost.seconds:12.6f}",
    ]
    if cost.phi_reduction_hidden:
        lines.append(f"  (hidden behind phi's backward pass: {cost.phi_reduction_hidden:.6f})")
    lines += [
        f"speed: {1 / cost.seconds:.3f} updates/s, {layout.num_particles / cost.seconds:.2f} particle-updates/s",
        f"communication: {100 * cost.communication_share:.2f} % of the update; a rank sends {cost.rank_sent_bytes / MIB:.2f} MiB, "
        f"a node {cost.node_sent_bytes / MIB:.2f} MiB",
        f"parallel efficiency: {cost.efficiency:.4f} of one rank with as many renders",
        "memory of a GPU, MiB (theta and phi with gradient and two Adam moments):",
        *(f"  {name:<18}{_mib(value)}" for name, value in scale.memory.items()),
        f"  {'known':<18}{_mib(sum(filter(None, scale.memory.values())))}",
        *(cards_in_words(scale.run, layout) if scale.run is not None else []),
        *_zero_3_in_words(scale),
        f"node-hours: {scale.node_hours:,.1f} for {num_prompts} prompt(s) x {parsed.num_updates:,} updates, "
        f"{scale.node_hours / cluster.num_nodes:,.2f} hours of all {cluster.num_nodes} node(s)",
    ]
    return "\n".join(lines)


def _zero_3_in_words(scale: Scale) -> list[str]:
    from dist_vsd.scaling.room import card_for

    num_bytes, network_bytes = zero_3_bytes(scale), scale.times.network_bytes
    if num_bytes is None or network_bytes is None:
        return []
    return [
        f"with ZeRO 3 over {scale.cost.layout.world_size} ranks: about {num_bytes / GIB:.1f} GiB: {card_for(num_bytes)} (what DeepSpeed "
        f"gathers at a time is taken to be as large as it may be; the network's {network_bytes / GIB:.1f} GiB are loaded whole first)"
    ]


def zero_3_bytes(scale: Scale) -> float | None:
    """Return what a GPU would hold if ZeRO 3 sharded the frozen network over all ranks; None where that is not known, or there is one."""
    from dist_vsd.scaling.room import with_zero_3

    num_ranks = scale.cost.layout.world_size
    if scale.peak is None or scale.times.network_bytes is None or num_ranks == 1:
        return None
    return with_zero_3(scale.peak.num_bytes, scale.times.network_bytes, num_ranks)


def _mib(value: float | None) -> str:
    return f"{'not known':>12}" if value is None else f"{value / MIB:12.1f}"


def several_scales(parsed: PlanArguments, num_prompts: int, scales: list[Scale]) -> str:
    """Return a table with a row for each number of nodes."""
    from dist_vsd.scaling.room import card_for

    rows = [COLUMNS]
    for scale in scales:
        cost, layout = scale.cost, scale.cost.layout
        cells = (str(cost.cluster.num_nodes), str(layout.world_size), str(layout.num_particles))
        cells += (f"{layout.num_shards} x {layout.view_ranks}", f"{cost.seconds:.4f}", f"{1 / cost.seconds:.3f}")
        cells += (f"{layout.num_particles / cost.seconds:.2f}", f"{100 * cost.communication_share:.2f}", f"{cost.efficiency:.4f}")
        rows.append((*cells, f"{known_bytes(scale) / GIB:.1f}", f"{scale.node_hours:,.1f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    sources = list(dict.fromkeys(scale.times.source for scale in scales))
    counted = "at the peak of an update, counted on shapes alone" if scales[0].peak is not None else _without_unknown(scales)
    notes = [f"efficiency: of one rank with as many renders; GiB: of a GPU, {counted}"]
    notes += [f"GiB: {card}" for card in dict.fromkeys(card_for(scale.peak.num_bytes) for scale in scales if scale.peak is not None)]
    notes.append(f"node-hours: of {num_prompts} prompt(s) x {parsed.num_updates:,} updates")
    return "\n".join([*(f"stage times: {source}" for source in sources), *table, *notes])


def known_bytes(scale: Scale) -> float:
    """Return what a GPU holds: as it is counted, or what is known of it."""
    return scale.peak.num_bytes if scale.peak is not None else sum(filter(None, scale.memory.values()))


def _without_unknown(scales: list[Scale]) -> str:
    unknown = [name for name, value in scales[0].memory.items() if value is None]
    return f"without {' and '.join(unknown)} (not known)" if unknown else "all that is counted"


def as_json(parsed: PlanArguments, num_prompts: int, scales: list[Scale]) -> str:
    """Return everything as JSON text."""
    asked = {name: value for name, value in dataclasses.asdict(parsed).items() if name != "json"}
    return json.dumps({"asked": asked, "num_prompts": num_prompts, "scales": [plain(scale) for scale in scales]}, indent=1) + "\n"


def plain(scale: Scale) -> dict[str, Any]:
    """Return a scale as plain values: seconds, bytes and shares."""
    cost, layout = scale.cost, scale.cost.layout
    seconds = {field.name: getattr(cost, field.name) for field in dataclasses.fields(cost) if isinstance(getattr(cost, field.name), float)}
    sent = {name: seconds.pop(f"{name}_sent_bytes") for name in ("rank", "node")}
    return {
        "num_nodes": cost.cluster.num_nodes,
        "num_ranks": layout.world_size,
        "num_particles": layout.num_particles,
        "num_shards": layout.num_shards,
        "view_ranks": layout.view_ranks,
        "num_views": layout.num_views,
        "most_particles_of_a_rank": most_particles(layout),
        "most_renders_of_a_rank": most_renders(layout),
        "seconds": {**seconds, "update": cost.seconds},
        "updates_per_second": 1 / cost.seconds,
        "particle_updates_per_second": layout.num_particles / cost.seconds,
        "communication_share": cost.communication_share,
        "efficiency": cost.efficiency,
        "sent_bytes_per_update": sent,
        "memory_bytes": scale.memory,
        "peak_bytes": scale.peak.num_bytes if scale.peak is not None else None,
        "zero_3_peak_bytes": zero_3_bytes(scale),
        "node_hours": scale.node_hours,
        "stage_times": {name: value for name, value in dataclasses.asdict(scale.times).items() if name != "sizes"},
        "sizes": dataclasses.asdict(scale.times.sizes),
    }
