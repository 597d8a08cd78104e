"""Of `benchmarks/gpu.py`: how fast an update is, how near to the machine's peaks, and whether its memory is what was counted."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from gpu_items import CPU, Item, Place, Skipped, free_memory, in_one_line

from dist_vsd.commands.bench_update import UpdateArguments, configuration, has_real_size
from dist_vsd.distributed.layout import Layout
from dist_vsd.priors.attention_names import why_not
from dist_vsd.scaling.as_published import published_ways
from dist_vsd.scaling.counted_memory import CountedMemory
from dist_vsd.scaling.peaks import Peaks, measure_peaks
from dist_vsd.scaling.shapes import shapes_alone
from dist_vsd.scaling.update_bench import META, Way, measure_way
from dist_vsd.training.state import DTYPES, build_state
from dist_vsd.training.update import update

TARGETS = {"updates/s, one particle": 12.0, "particle-updates/s, eight": 40.0, "times as published": 8.0, "share of the matmul peak": 0.3}
UPDATES, WARMUP = 8, 3
UPDATES_AS_PUBLISHED = 3
MAIN = "sd21, 1 particle"
SMALL_FIELD = ("--field.num-samples", "8", "--field.dense-grid.resolutions", "8")


@dataclasses.dataclass(frozen=True)
class Question:
    """An update to time.

    Attributes:
        size: of the prior, as `bench update --size`.
        num_particles: that pass through the networks together.
        seconds: its budget.
        attention: back end.
        words: for train.
        targets: by the name of a figure.
    """

    size: str
    num_particles: int = 1
    seconds: float = 30.0
    attention: str = "sdpa"
    words: tuple[str, ...] = ()
    targets: dict[str, float] = dataclasses.field(default_factory=dict)


# The preset has room for all 256 samples of each of 512 x 512 rays: 60 GiB counted for one particle, 259 GiB for eight. With room for those
# that are seen, as of a scene that is empty around its object, eight are 40 GiB.
FEW = ("--field.samples-per-ray", "64", "--field.visible-per-ray", "16", "--field.hidden-below", "1e-4")
SHARE = {"of the matmul peak": TARGETS["share of the matmul peak"]}
QUESTIONS = {
    MAIN: Question("sd21", seconds=40, targets=SHARE | {"updates/s": TARGETS["updates/s, one particle"]}),
    "sd21, 1 particle, few samples": Question("sd21", words=FEW, targets=SHARE | {"updates/s": TARGETS["updates/s, one particle"]}),
    "sd21, 8 particles, few samples": Question(
        "sd21", 8, 40, words=FEW, targets=SHARE | {"particle-updates/s": TARGETS["particle-updates/s, eight"]}
    ),
    "sd21, as published": Question("sd21", seconds=60, targets={"times as published": TARGETS["times as published"]}),
    "sd21, 1 particle, --score.reuse-pass": Question("sd21", words=("--score.reuse-pass",), targets=SHARE),
    "sd21, 1 particle, flash": Question("sd21", attention="flash"),
    "sd21, 1 particle, xformers": Question("sd21", attention="xformers"),
    "embedded, 1 particle": Question("embedded", seconds=15),
    "embedded, 8 particles": Question("embedded", 8, 15),
    "embedded, 64 particles": Question("embedded", 64, 20),
    "sd15, 1 particle": Question("sd15", seconds=30),
    "sdxl, 1 particle, few samples": Question("sdxl", seconds=60, words=FEW),
}
QUESTIONS_IN_SMALL = {
    MAIN: Question("tiny", words=SMALL_FIELD, targets=QUESTIONS[MAIN].targets),
    "sd21, as published": Question("tiny", words=SMALL_FIELD, targets=QUESTIONS["sd21, as published"].targets),
    "sd21, 1 particle, flash": Question("tiny", attention="flash"),
}


class Speed:
    """Times updates, measures the peaks of a precision once, and remembers what the comparison with the published way needs.

    Args:
        place: where.
    """

    def __init__(self, place: Place) -> None:
        self._place, self._peaks, self._seconds = place, dict[str, Peaks](), dict[str, float]()
        self._updates, self._warmup = (1, 0) if place.small else (UPDATES, WARMUP)

    def peaks(self, precision: str) -> Peaks:
        """Return the machine's peaks in a precision."""
        if precision not in self._peaks:
            self._peaks[precision] = measure_peaks(self._place.device, DTYPES[precision])
        return self._peaks[precision]

    def way(self, name: str, question: Question) -> Way:
        """Return our way of a question; Skipped if its attention is not here."""
        device = self._place.device
        parsed = UpdateArguments(size=question.size, num_particles=question.num_particles, attention=question.attention)
        if reason := why_not(question.attention, "fp32" if device == CPU else "bf16"):
            raise Skipped(reason)
        return Way(name=name, config=configuration(parsed, question.words, device))

    def measure(self, way: Way, num_updates: int) -> dict[str, Any]:
        """Return `bench update`'s row."""
        return measure_way(way, self._place.device, num_updates, self._warmup, self.peaks(way.config.precision))

    def ours(self, name: str, question: Question) -> dict[str, Any]:
        """Time our update; beside it, its memory counted on shapes alone."""
        way = self.way(name, question)
        row = self.measure(way, self._updates)
        self._seconds[name] = row["seconds_per_update"]
        figures = figures_of(row) | memory_against_count(way, row["peak_memory_mib"])
        return {"figures": with_targets(figures, question.targets), "row": row}

    def published(self, name: str, question: Question) -> dict[str, Any]:
        """Time the published ways, and say how many times as fast ours was with one particle."""
        config = self.way(name, question).config
        ways = published_ways(config, can_fp16=self._place.device != CPU, has_real_size=has_real_size(question.size))
        figures, rows, ours = {}, [], self._seconds.get(MAIN)
        for way in ways:
            try:
                row = self.measure(way, 1 if self._place.small else UPDATES_AS_PUBLISHED)
            except RuntimeError as error:
                figures[f"{way.name} did not run"] = in_one_line(error)
                free_memory()
                continue
            rows.append(row)
            figures |= {f"{key}, {way.name}": value for key, value in figures_of(row).items()}
            if ours is not None:
                ratio = {"times as published": row["seconds_per_update"] / ours}
                figures |= {f"{key}, {way.name}": value for key, value in with_targets(ratio, question.targets).items()}
        return {"figures": figures, "rows": rows}


def figures_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return what is shown of a row."""
    return {
        "updates/s": 1 / row["seconds_per_update"],
        "particle-updates/s": row["particle_updates_per_second"],
        **{f"ms of {stage}": milliseconds for stage, milliseconds in row["stage_ms"].items()},
        "TFLOP": row["flop"] / 1e12,
        "of the matmul peak": row["share_of_matmul_peak"],
        "of the copy peak, unfused": row["share_of_copy_peak"],
        "peak memory, MiB": row["peak_memory_mib"],
    }


def memory_against_count(way: Way, peak_mib: float) -> dict[str, float]:
    """Return the peak counted on shapes alone from the making of the state to its second update, and the measured one over it."""
    config = dataclasses.replace(way.config, attention="sdpa")  # on shapes alone no other kernel is there
    with shapes_alone(), CountedMemory(META) as count:
        state = build_state(config, Layout.of(config.num_particles, num_views=config.num_views), META)
        for index in (0, 1):  # Adam's moments are there from the second on
            update(state, index)
    counted = count.peak_bytes / 2**20
    return {"counted memory, MiB": counted, "peak memory over counted": peak_mib / counted}


def with_targets(figures: dict[str, Any], targets: dict[str, float]) -> dict[str, Any]:
    """Return figures with their targets beside them."""
    return {name: {"value": value, "target": targets[name]} if name in targets else value for name, value in figures.items()}


def items(place: Place) -> list[Item]:
    """Return the items, most valuable first: the peaks of this machine, then updates."""
    speed, found = Speed(place), []
    for precision in ("fp32",) if place.small else ("bf16", "fp32", "fp16"):
        work = functools.partial(_peaks, speed, precision)
        found.append(Item("speed", f"peaks in {precision}", 10, work))
    for name, question in (QUESTIONS_IN_SMALL if place.small else QUESTIONS).items():
        work = speed.published if name.endswith("as published") else speed.ours
        found.append(Item("speed", name, question.seconds, functools.partial(work, name, question), may_not_fit=True))
    return found


def _peaks(speed: Speed, precision: str) -> dict[str, Any]:
    peaks = speed.peaks(precision)
    figures = {"TFLOP/s in products": peaks.matmul_flop_per_second / 1e12, "GB/s in copies": peaks.copy_bytes_per_second / 1e9}
    return {"figures": figures}
