"""Whether an update fits a GPU, by its counted memory: which card it wants, and in what tiles a field is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from dist_vsd.config import RunConfig, flag
from dist_vsd.distributed.layout import Layout
from dist_vsd.scaling.cost_model import Peak
from dist_vsd.scaling.counted_memory import count_peak
from dist_vsd.scaling.memory import GIB, Memory, in_words

CARDS_GB = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180, 288)  # as they are sold; each has about as many GiB
KEPT_FREE_GIB, KEPT_FREE_SHARE = 2.0, 0.05  # for CUDA's context, workspaces and gaps between blocks; the greater of the two
LIVE_NUMBERS = 10**9  # DeepSpeed's stage3_max_live_parameters, which launch_configs/ leave as it is
# Points of a tile that are tried, the largest first; 0: all points at once. Beyond the smallest the field is no longer what holds most.
TILE_POINTS = (0, 2**21, 2**19, 2**17)


def room_for(num_bytes: float) -> float:
    """Return the bytes that a GPU must have for an update that holds so many at its peak."""
    return max(num_bytes + KEPT_FREE_GIB * GIB, num_bytes / (1 - KEPT_FREE_SHARE))


def with_zero_3(peak_bytes: float, network_bytes: float, num_ranks: int) -> float:
    """Estimate what a GPU holds at the peak of an update if the frozen network is sharded over all ranks (DeepSpeed's ZeRO 3).

    Its share stays, and what DeepSpeed gathers at a time is the whole network, but no more than LIVE_NUMBERS.

    Args:
        peak_bytes: without.
        network_bytes: of the network, in bf16.
        num_ranks: that share it.
    """
    own = network_bytes / num_ranks
    return peak_bytes - network_bytes + min(network_bytes, own + 2 * LIVE_NUMBERS)


def card_for(num_bytes: float) -> str:
    """Name the smallest card that an update fits which holds so many bytes at its peak."""
    fitting = [size for size in CARDS_GB if size * GIB >= room_for(num_bytes)]
    return f"fits a card of {fitting[0]} GB" if fitting else f"fits no card of today, of which the largest has {CARDS_GB[-1]} GB"


@dataclasses.dataclass(frozen=True)
class Tiles:
    """In what tiles a field is asked, and what an update holds then.

    Attributes:
        points: of a tile, as --field.tile-points says it; 0: all at once; None: the particle has no field.
        peak: of an update.
    """

    points: int | None
    peak: Peak

    def __str__(self) -> str:
        told = f"{in_words(self.peak.num_bytes)} at the peak of an update, in stage {self.peak.stage}"
        if self.points is None:
            return told
        how = f"the field asked in tiles of {self.points:,} points" if self.points else "all points of the field at once"
        return f"{told}, with {how}"


def with_tiles(config: RunConfig, points: int | None) -> RunConfig:
    """Return a run whose field, if it has one, is asked in tiles of so many points."""
    if points is None:
        return config
    return dataclasses.replace(config, field=dataclasses.replace(config.field, tile_points=points))


def tiles_to_choose_from(config: RunConfig, layout: Layout) -> Iterator[Tiles]:
    """Count an update in all tiles that are tried, the fastest first; in those alone that the run names, if it does."""
    named = config.field.tile_points if config.representation_row.is_volume else None
    for points in TILE_POINTS if named == 0 else (named,):
        yield Tiles(points, count_peak(with_tiles(config, points), layout))


def cards_in_words(config: RunConfig, layout: Layout) -> list[str]:
    """Say what an update takes of a GPU, and which card it fits: as fast as it goes, and in tiles if a smaller card does then."""
    lines: list[str] = []
    for tiles in tiles_to_choose_from(config, layout):
        card = card_for(tiles.peak.num_bytes)
        if not lines or not lines[-1].endswith(card):
            lines.append(f"on a GPU: {tiles}: {card}")
        if card == f"fits a card of {CARDS_GB[0]} GB":
            break
    return [*lines, "  (counted on shapes alone, without what libraries take for themselves; a GPU chooses by what is free)"]


def choose_tiles(config: RunConfig, layout: Layout, memory: Memory) -> Tiles:
    """Choose the largest tiles with which an update fits: they cost no time where memory is plenty, and a second render where it is not.

    Args:
        config: of a run, or of a stage; tiles that it names stay.
        layout: of its particles.
        memory: of this rank's GPU.

    Returns:
        The choice: the smallest tiles where nothing is sure to fit, and it will be tried.

    Raises:
        ValueError: an update can't fit even if the GPU is empty; it says what would.
    """
    for chosen in tiles_to_choose_from(config, layout):
        if room_for(chosen.peak.num_bytes) <= memory.free:
            return chosen
    if chosen.peak.num_bytes > memory.total:
        has = f"{memory.where} has {in_words(memory.total)}"
        raise ValueError(f"an update can't fit: it takes {chosen}; {has}; {_remedy(with_tiles(config, chosen.points), layout, memory)}")
    return chosen


def _remedy(config: RunConfig, layout: Layout, memory: Memory) -> str:
    """Say which flags make an update fit a GPU that is empty; the fewest that do."""
    smaller, recomputed = {"micro_batch_size": 1}, {"score": dataclasses.replace(config.score, recompute=True)}
    offloaded = {"particles": dataclasses.replace(config.particles, offload=True)}
    words = f"{flag('micro_batch_size')} 1", flag("score.recompute"), flag("particles.offload")
    for used in ((0,), (1,), (2,), (0, 1), (0, 2), (0, 1, 2)):
        changes = [(smaller, recomputed, offloaded)[i] for i in used]
        changed = dataclasses.replace(config, **{name: value for change in changes for name, value in change.items()})
        if changed != config and room_for(count_peak(changed, layout).num_bytes) <= memory.total:
            return f"by the count it fits with {' '.join(words[i] for i in used)}"
    return f"lower {flag('render_size')}, or take a smaller prior"
