"""Which runs a scaling measurement compares, and what follows from their seconds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dist_vsd.scaling.measure import STAGES, Job, RunSizes, Settings, Timing

WEAK, STRONG, CONTROL = "weak", "strong", "control"


def comparisons(ranks: Sequence[int], particles_per_rank: int, strong_particles: int, num_places: int) -> list[tuple[str, Job]]:
    """Return (mode, job) of every row; the 1-rank run that the others of a mode are compared with comes first.

    Args:
        ranks: numbers of ranks, 1 among them.
        particles_per_rank: of weak scaling and its control.
        strong_particles: in all, of strong scaling; 0 leaves it out.
        num_places: cores or GPUs; a control of more runs than places would measure nothing.
    """
    weak = [(WEAK, Job(w, w * particles_per_rank)) for w in sorted(ranks)]
    control = [(CONTROL, Job(1, particles_per_rank, num_runs=w)) for w in sorted(ranks) if 1 < w <= num_places]
    strong = [(STRONG, Job(w, strong_particles)) for w in sorted(ranks)] if strong_particles else []
    return weak + control + strong


def jobs_of(rows: Sequence[tuple[str, Job]]) -> list[Job]:
    """Return each different job once, in order: a run can stand in two rows."""
    return list(dict.fromkeys(job for _, job in rows))


def efficiency(mode: str, num_ranks: int, one_rank_seconds: float, seconds: float) -> float:
    """Return the share of perfect scaling: T_1 / T_W with the work of a rank fixed, T_1 / (W T_W) with that of all fixed."""
    return one_rank_seconds / (seconds * (num_ranks if mode == STRONG else 1))


def reference(mode: str, rows: Sequence[tuple[str, Job]]) -> Job:
    """Return the 1-rank run that a mode is compared with; the control's is weak scaling's."""
    return next(job for m, job in rows if m == (STRONG if mode == STRONG else WEAK) and job.num_ranks == 1)


def make_rows(
    rows: Sequence[tuple[str, Job]],
    timings: Mapping[Job, Sequence[Timing]],
    sizes: Mapping[Job, RunSizes],
    settings: Settings,
    num_places: int,
) -> list[dict[str, Any]]:
    """Return the rows of the record.

    Every ratio is taken within a repeat, between runs that followed one another; an efficiency is the median of its
    ratios.

    Args:
        rows: from comparisons().
        timings: of each job, one a repeat.
        sizes: of each job.
        settings: of all jobs.
        num_places: cores or GPUs.
    """
    made = []
    for mode, job in rows:
        own, ones = timings[job], timings[reference(mode, rows)]
        ratios = [efficiency(mode, job.num_ranks, one.seconds_per_update, t.seconds_per_update) for one, t in zip(ones, own, strict=True)]
        seconds = statistics.median(t.seconds_per_update for t in own)
        sent = [t.sent_bytes_per_update for t in own if t.sent_bytes_per_update is not None]
        memory = [t.peak_memory_mib for t in own if t.peak_memory_mib is not None]
        made.append(
            {
                "mode": mode,
                "num_ranks": job.num_ranks,
                "num_runs": job.num_runs,
                "num_particles": job.num_particles,
                "num_updates": settings.num_updates,
                "num_warmup": settings.num_warmup,
                "seconds_per_update": seconds,
                "stages": {s: seconds * statistics.fmean(t.stages[s] / t.seconds_per_update for t in own) for s in STAGES},
                "sent_bytes_per_update": round(statistics.median(sent)) if sent else None,
                "peak_memory_mib": statistics.median(memory) if memory else None,
                **dataclasses.asdict(sizes[job]),
                "efficiency": statistics.median(ratios),
                "cores_shared": job.num_ranks * job.num_runs > num_places,
                "repeats": [
                    {"seconds_per_update": t.seconds_per_update, "efficiency": ratio} for t, ratio in zip(own, ratios, strict=True)
                ],
            }
        )
    return made


def weak_efficiency(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return, by number of ranks, what weak scaling loses to the machine and what to the synchronisation.

    A single rank has an otherwise idle machine to itself: its memory bandwidth, its caches, its clock. So T_1 / T_W mixes
    two things, which W independent runs at the same time take apart: T_1 / T_control is what sharing the machine leaves,
    T_control / T_W what the ranks' waiting for one another leaves of that.

    Args:
        rows: from make_rows().

    Returns:
        For each W > 1: "plain" (T_1 / T_W), "control" and "synchronisation" (None where no control could run) and "cores_shared".
    """
    controls = {row["num_runs"]: row for row in rows if row["mode"] == CONTROL}
    found = {}
    for row in rows:
        if row["mode"] != WEAK or row["num_ranks"] == 1:
            continue
        control = controls.get(row["num_ranks"])
        ratios = []
        if control:
            pairs = zip(control["repeats"], row["repeats"], strict=True)
            ratios = [alone["seconds_per_update"] / together["seconds_per_update"] for alone, together in pairs]
        found[str(row["num_ranks"])] = {
            "plain": row["efficiency"],
            "control": control["efficiency"] if control else None,
            "synchronisation": statistics.median(ratios) if ratios else None,
            "cores_shared": row["cores_shared"],
        }
    return found
