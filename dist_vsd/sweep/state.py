"""Where every run of a sweep stands, from small files alone: ten thousand runs in seconds, without torch."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
from pathlib import Path

import yaml

from dist_vsd.runs import lease as leases
from dist_vsd.runs.outcome import CONFIG_FILE, newest_update
from dist_vsd.sweep.attempts import DONE as DONE_CODE
from dist_vsd.sweep.attempts import STOPPED as STOPPED_CODE
from dist_vsd.sweep.attempts import last_word
from dist_vsd.sweep.manifest import PlannedRun, Sweep

WAITING, RUNNING, STOPPED, DONE, FAILED = STATES = ("waiting", "running", "stopped", "done", "failed")
METRICS_FILE = "metrics.jsonl"
TAIL_BYTES = 8192  # of metrics.jsonl: its last lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands.

    Attributes:
        run: which.
        state: waiting, running, stopped (early, saved), done or failed.
        update: updates done (and saved, unless running).
        num_updates: of the whole run; None where the preset does not say.
        seconds_per_update: of a running one; None before its first figures.
        error: why it failed, one line.
        note: what else is to be known, one line.
    """

    run: PlannedRun
    state: str
    update: int = 0
    num_updates: int | None = None
    seconds_per_update: float | None = None
    error: str = ""
    note: str = ""

    @property
    def updates_per_second(self) -> float | None:
        """Its speed; None if it is not running or not known yet."""
        return 1 / self.seconds_per_update if self.seconds_per_update else None

    @property
    def seconds_left(self) -> float | None:
        """What a running one has left; None if that is not known."""
        if self.seconds_per_update is None or self.num_updates is None:
            return None
        return self.seconds_per_update * max(0, self.num_updates - self.update)


def states_of(sweep: Sweep) -> dict[str, RunState]:
    """Return the state of each run by its id, in the manifest's order."""
    leases_of = leases.all_leases(sweep.path / "leases")
    now = leases.file_system_now(sweep.path / "leases") if leases_of else 0.0
    begun = _names(sweep.path / "runs") | {name.removesuffix(".json") for name in _names(sweep.path / "attempts")}
    preset = _preset_num_updates(sweep.settings.preset)
    states = {}
    for run in sweep.runs:
        run_id, planned = run.id, run.overrides.get("num_updates", preset)
        held = leases_of.get(run_id)
        if held is not None and held.is_alive(now):
            states[run_id] = _running(sweep, run, planned, held)
        elif run_id in begun:
            states[run_id] = _not_running(sweep, run, planned, held)
        else:
            states[run_id] = RunState(run=run, state=WAITING, num_updates=planned, note=_killed(held))
    return states


def _running(sweep: Sweep, run: PlannedRun, planned: int | None, held: leases.LeaseFile) -> RunState:
    run_dir = sweep.run_dir(run)
    update, seconds = _last_figures(run_dir / METRICS_FILE)
    return RunState(
        run=run,
        state=RUNNING,
        update=update or newest_update(run_dir),
        num_updates=_num_updates(run_dir, planned),
        seconds_per_update=seconds,
        note=f"by {held.owner}" if held.owner else "",
    )


def _not_running(sweep: Sweep, run: PlannedRun, planned: int | None, held: leases.LeaseFile | None) -> RunState:
    run_dir, word = sweep.run_dir(run), last_word(sweep, run)
    values = {"run": run, "update": newest_update(run_dir), "num_updates": _num_updates(run_dir, planned)}
    if word is None:
        return RunState(state=WAITING, note=_killed(held), **values)
    state = {DONE_CODE: DONE, STOPPED_CODE: STOPPED}.get(word.exit_code, FAILED)
    error = (word.error or f"ended with {word.exit_code}") if state == FAILED else ""
    return RunState(state=state, error=error, **values)


def _killed(held: leases.LeaseFile | None) -> str:
    """Return what is known of an owner that died without giving its lease back, or nothing."""
    if held is None:
        return ""
    return f"{held.owner or 'its process'} was killed without a word; the next submit goes on from what is saved"


def _num_updates(run_dir: Path, planned: int | None) -> int | None:
    """Return the updates of a run: its resolved configuration's, or those planned while it has none."""
    try:
        found = re.search(r"^num_updates: (\d+)$", (run_dir / CONFIG_FILE).read_text(errors="replace"), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) if found else planned


def _preset_num_updates(preset: str) -> int | None:
    """Return the updates that a preset asks for; None if it does not say."""
    try:
        return yaml.safe_load((Path(__file__).parent.parent / "presets" / f"{preset}.yaml").read_text()).get("num_updates")
    except OSError:
        return None


def _last_figures(file: Path) -> tuple[int, float | None]:
    """Return the last update that was logged and the median seconds of the last few; zero and None before the first."""
    try:
        with open(file, "rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return 0, None
    update, seconds = 0, []
    for line in lines:
        try:
            values = json.loads(line)
            update = values["update"]
            seconds += [values["seconds/update"]] if values.get("seconds/update") else []
        except (ValueError, KeyError, TypeError):  # cut off, at either end
            continue
    return update, statistics.median(seconds) if seconds else None


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()
