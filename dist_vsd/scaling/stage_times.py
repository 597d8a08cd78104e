"""Where the seconds of a stage come from: a bench file, a run directory, or counted work. Nothing in a file is trusted."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

from dist_vsd.config_files import read_yaml
from dist_vsd.distributed.layout import Layout
from dist_vsd.scaling.cost_model import NOTHING, NUMBER_BYTES, STATE_NUMBERS, Sizes, StageSeconds

STAGES = ("render", "scores", "backward", "phi")  # as training/update.py has them
MAKE_ONE = "make one with `dist-vsd bench scaling`, or give a run directory of `dist-vsd train`"
LARGEST, MOST_RANKS = 10**15, 10**6  # no real file says more
SHORTEST_SECONDS = 1e-9
MIB = 2**20

# Stable Diffusion 2.1 at 512 px, batch 1, counted on meta tensors; GFLOP, a multiplication with its addition is 2.
UNET_FORWARD, UNET_LORA_FORWARD_BACKWARD = 804.0, 1715.0
ENCODER_FORWARD, ENCODER_FORWARD_BACKWARD = 1117.0, 2268.0
UNET_NUMBERS, VAE_NUMBERS = 865_910_724, 83_653_863
LORA_NUMBERS, CAMERA_NUMBERS = 829_952, 1_661_440  # rank 4; 16 -> 1280 -> 1280
HASH_FIELD_NUMBERS = 12_200_337  # of the preset stable-diffusion
FROZEN_BYTES = 2  # bf16
# SD's UNet with guidance at 54 iterations a second, as published for an H100 without compilation: 54 x 2 x 804 GFLOP.
H100_TFLOPS = 87.0
# thu-ml publishes 9 hours on an RTX 4090 for 70,000 updates of its three stages: 460 ms each, of which the networks leave some 360.
ASSUMED_RENDER_MS = 120.0


@dataclasses.dataclass(frozen=True)
class StageTimes:
    """Seconds by stage, what a rank holds, and where both are from.

    Attributes:
        stages: of one render.
        sizes: of theta, phi and the frozen networks.
        source: one line for the reader.
        fixed: of an update, whatever the number of renders.
        network_bytes: of the frozen network, which ZeRO 3 shards; None where it is not known.
    """

    stages: StageSeconds
    sizes: Sizes
    source: str
    fixed: StageSeconds = NOTHING
    network_bytes: int | None = None


def counted(gpu_tflops: float, render_ms: float) -> StageTimes:
    """Return Stable Diffusion 2.1's stage times by counted work.

    Args:
        gpu_tflops: sustained.
        render_ms: of g(theta, c) alone, without gradient; its backward pass is taken to be twice that, as of a matrix product.
    """
    second = 1e-3 / gpu_tflops  # of a GFLOP
    field = render_ms * 1e-3
    stages = StageSeconds(
        render=field + ENCODER_FORWARD * second,
        scores=3 * UNET_FORWARD * second,  # eps_pretrain with guidance is two passes, eps_phi one
        backward=2 * field + (ENCODER_FORWARD_BACKWARD - ENCODER_FORWARD) * second,
        phi=UNET_LORA_FORWARD_BACKWARD * second,
    )
    prior_bytes = FROZEN_BYTES * (UNET_NUMBERS + VAE_NUMBERS)
    sizes = Sizes(HASH_FIELD_NUMBERS, LORA_NUMBERS + CAMERA_NUMBERS, prior_bytes, None)
    source = (
        f"counted, not measured: GFLOP of Stable Diffusion 2.1 at 512 px, at {gpu_tflops:g} TFLOP/s sustained; "
        f"{render_ms:g} ms a render and twice that for its gradient are an assumption"
    )
    return StageTimes(stages, sizes, source, network_bytes=FROZEN_BYTES * UNET_NUMBERS)


def counted_of(size: str, gpu_tflops: float, render_ms: float) -> StageTimes:
    """Return the stage times of another architecture by work that is counted now; see counted().

    Args:
        size: of architecture_names.SIZES.
        gpu_tflops: sustained.
        render_ms: as of counted().
    """
    from dist_vsd.scaling.counted_prior import count_prior

    work, second, field = count_prior(size), 1e-3 / gpu_tflops, render_ms * 1e-3
    stages = StageSeconds(
        render=field + work.encoder_forward * second,
        scores=3 * work.network_forward * second,
        backward=2 * field + (work.encoder_forward_backward - work.encoder_forward) * second,
        phi=work.lora_forward_backward * second,
    )
    network_bytes = FROZEN_BYTES * work.network_numbers
    sizes = Sizes(HASH_FIELD_NUMBERS, work.phi_numbers, network_bytes + FROZEN_BYTES * work.vae_numbers, None)
    source = (
        f"counted, not measured: GFLOP of {size} at {work.image_size} px, at {gpu_tflops:g} TFLOP/s sustained; "
        f"{render_ms:g} ms a render and twice that for its gradient are an assumption"
    )
    return StageTimes(stages, sizes, source, network_bytes=network_bytes)


def read_measured(path: Path, renders_of_a_rank: float) -> StageTimes:
    """Read stage times from a file of `dist-vsd bench scaling`, or from a run directory.

    Args:
        path: of the file or the directory.
        renders_of_a_rank: that are planned. Of rows on one rank with several numbers of renders, the two nearest give a fixed
            cost and a cost of a render; one alone is taken in proportion.

    Raises:
        ValueError: the file is missing, or is not what it should be.
    """
    try:
        if path.is_dir():
            return _of_run(path)
        if not path.is_file():
            raise ValueError(f"measurement {path} does not exist: {MAKE_ONE}")
        content = _json(path.read_text(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"measurement {path} can't be read ({type(error).__name__}): {MAKE_ONE}") from error
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"measurement {path} must hold a list of rows: {MAKE_ONE}")
    # Of independent runs at the same time (num_runs), none had the machine to itself.
    alone = [row for row in rows if row.get("num_ranks") == 1 and row["num_ranks"] is not True and row.get("num_runs", 1) == 1]
    if not alone:
        raise ValueError(f"measurement {path} needs a row with num_ranks 1, its {len(rows)} row(s) have none: {MAKE_ONE}")
    by_renders = {_count(row, "num_particles", path) * _count(row, "num_views", path, 1): row for row in alone}
    nearest = sorted(by_renders, key=lambda renders: abs(renders - renders_of_a_rank))[:2]
    machine = content.get("machine")
    where = f" on {' '.join(machine.split())[:80]}" if isinstance(machine, str) and machine.split() else ""
    seconds = {renders: _row_seconds(by_renders[renders], path) for renders in nearest}
    source = f"measured{where}: {' and '.join(map(str, sorted(nearest)))} render(s) an update on one rank, {path}"
    sizes = _row_sizes(by_renders[nearest[0]], nearest[0], path)
    stages, fixed = line_through(seconds) if len(nearest) > 1 else (_scaled(seconds[nearest[0]], 1 / nearest[0]), NOTHING)
    return StageTimes(stages, sizes, source, fixed)


def line_through(seconds: dict[int, StageSeconds]) -> tuple[StageSeconds, StageSeconds]:
    """Return (seconds of one render, fixed seconds) of the line through two measurements, stage by stage.

    Neither is negative: a stage that got shorter with more renders is taken as fixed, one that grew faster than the renders as
    proportional, at the larger measurement.

    Args:
        seconds: of a whole update, by its number of renders.
    """
    (few, short), (many, long) = sorted(seconds.items())
    each, fixed = {}, {}
    for stage in dataclasses.fields(StageSeconds):
        a, b = getattr(short, stage.name), getattr(long, stage.name)
        slope = min(max(0.0, (b - a) / (many - few)), b / many)
        each[stage.name], fixed[stage.name] = slope, b - slope * many
    return StageSeconds(**each), StageSeconds(**fixed)


def _scaled(seconds: StageSeconds, factor: float) -> StageSeconds:
    return StageSeconds(**{name: value * factor for name, value in dataclasses.asdict(seconds).items()})


def _row_seconds(row: dict[str, Any], path: Path) -> StageSeconds:
    """Return the seconds of a whole update by a bench file's row, but of one phi step."""
    seconds, steps = row.get("stages"), _count(row, "steps_per_update", path, 1)
    if not isinstance(seconds, dict):
        raise ValueError(f"measurement {path}: stages must hold seconds by stage, got {_short(seconds)}: {MAKE_ONE}")
    each = {name: _number(seconds, name, path) for name in STAGES}
    if sum(each.values()) < SHORTEST_SECONDS:
        raise ValueError(f"measurement {path}: the stages must take some time, they add up to {sum(each.values())} s: {MAKE_ONE}")
    other = max(0.0, _number(row, "seconds_per_update", path) - sum(each.values()))
    return StageSeconds(each["render"], each["scores"], each["backward"], each["phi"] / steps, other)


def _row_sizes(row: dict[str, Any], renders: int, path: Path) -> Sizes:
    """Return what a rank holds by a bench file's row."""
    theta, phi = _count(row, "theta_numbers", path), _count(row, "phi_numbers", path, least=0)
    prior = _number(row, "prior_bytes", path) if row.get("prior_bytes") is not None else None
    render_bytes = None
    if prior is not None and row.get("peak_memory_mib") is not None:
        held = prior + STATE_NUMBERS * NUMBER_BYTES * (theta * _count(row, "num_particles", path) + phi)
        rest = _number(row, "peak_memory_mib", path) * MIB - held
        together = min(renders, _count(row, "micro_batch_size", path, renders))
        render_bytes = rest / together if rest > 0 else None
    return Sizes(theta, phi, prior, render_bytes)


def _of_run(path: Path) -> StageTimes:
    """Return the stage times of a run: the medians of metrics.jsonl, over the renders that an average rank has."""
    config_file, metrics_file = path / "config.yaml", path / "metrics.jsonl"
    if not config_file.is_file() or not metrics_file.is_file():
        raise ValueError(f"measurement {path} is a folder without config.yaml and metrics.jsonl: {MAKE_ONE}")
    config = read_yaml(config_file)
    score = config.get("score") if isinstance(config.get("score"), dict) else {}
    world_size, checkpoint = _newest_checkpoint(path)
    # Runs made before a particle could have several views lack the key; one view a rank is what they did.
    views, shards = (_count(config, name, config_file, 0, least=0) for name in ("num_views", "num_shards"))
    num_particles = _count(config, "num_particles", config_file)
    try:
        views = views or Layout.of(num_particles, world_size, num_shards=shards).num_views
    except ValueError as error:
        raise ValueError(f"measurement {path}: {error}") from error
    renders = num_particles * views / world_size
    rows = [row for row in map(_json_or_none, metrics_file.read_text(errors="replace").splitlines()) if _has_stages(row)]
    rows = rows[1:] if len(rows) > 2 else rows  # the first one warms up
    if not rows:
        raise ValueError(f"measurement {path}: metrics.jsonl has no line with the seconds of an update: let the run log one")
    median = {name: statistics.median(float(row.get(f"seconds/{name}", 0.0)) for row in rows) / renders for name in (*STAGES, "update")}
    steps = _count(score, "steps_per_update", config_file, 1)
    other = max(0.0, median["update"] - sum(median[name] for name in STAGES))
    stages = StageSeconds(median["render"], median["scores"], median["backward"], median["phi"] / steps, other)
    source = f"measured: medians of {len(rows)} updates of {path}, {renders:g} render(s) an update on each of {world_size} rank(s)"
    if world_size > 1:
        source += "; its phi seconds contain reductions and waiting, so plan from a run on one rank if you can"
    theta, phi = _trained_numbers(checkpoint)
    return StageTimes(stages, Sizes(theta, phi, None, None), source)


def _newest_checkpoint(path: Path) -> tuple[int, Path]:
    """Return (world size, folder) of the newest checkpoint that has a manifest."""
    for folder in sorted((path / "checkpoints").glob("update_*"), reverse=True):
        file = folder / "manifest.json"
        manifest = _json_or_none(file.read_text(errors="replace")) if file.is_file() else None
        if isinstance(manifest, dict):
            return _count(manifest, "world_size", file, most=MOST_RANKS), folder
    raise ValueError(f"measurement {path} has no checkpoint, which says on how many ranks it ran: let the run save one")


def _trained_numbers(checkpoint: Path) -> tuple[int, int]:
    """Return (theta's numbers of one particle, phi's) by the shapes in a checkpoint; Adam has moments of what is trained alone."""
    particles = sorted((checkpoint / "particles").glob("*.safetensors"))
    theta = sum(n for name, n in _shapes(particles[0]).items() if name.endswith("/exp_avg")) if particles else 0
    if not theta:
        raise ValueError(f"measurement {checkpoint} holds no particle with Adam's moments: take another run")
    phi_file = checkpoint / "phi.safetensors"
    return theta, sum(_shapes(phi_file).values()) if phi_file.is_file() else 0


def _shapes(file: Path) -> dict[str, int]:
    """Return the number of elements of each tensor of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as opened:
            return {name: math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"measurement {file} can't be read as safetensors ({type(error).__name__}): take another run") from error


def _has_stages(row: Any) -> bool:
    """Say whether a line of metrics.jsonl holds usable seconds; SDS has none for phi."""
    if not isinstance(row, dict):
        return False
    values = [row.get(f"seconds/{name}", 0.0 if name == "phi" else None) for name in (*STAGES, "update")]
    return all(map(_is_number, values)) and sum(values) >= SHORTEST_SECONDS


def _json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"measurement {path} is not JSON ({' '.join(str(error).split())[:80]}): {MAKE_ONE}") from error


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LARGEST  # NaN compares as false


def _number(row: dict[str, Any], name: str, path: Path) -> float:
    value = row.get(name)
    if not _is_number(value):
        raise ValueError(f"measurement {path}: {name} must be a number from 0 on, got {_short(value)}: {MAKE_ONE}")
    return float(value)


def _count(row: dict[str, Any], name: str, path: Path, default: int | None = None, least: int = 1, most: int = LARGEST) -> int:
    value = row.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"measurement {path}: {name} must be a count of {least} to {most:.0e}, got {_short(value)}: {MAKE_ONE}")
    return value


def _short(value: Any) -> str:
    text = f"a {type(value).__name__}" if isinstance(value, (dict, list)) else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
