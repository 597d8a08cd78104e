"""Planning a sweep: prompts x settings x seeds, every run's configuration checked before anything is written.

A sweep grows and never changes: planning again adds the runs that it does not hold yet.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dist_vsd.config import RunConfig
from dist_vsd.config_files import load_preset, to_mapping
from dist_vsd.distributed.layout import Layout
from dist_vsd.particles.representations import REPRESENTATIONS
from dist_vsd.priors.hub import is_hub_id
from dist_vsd.priors.known import SUGGESTED
from dist_vsd.priors.pipeline_folder import PipelineFolder, find_pipeline
from dist_vsd.priors.prompts import check_prompts
from dist_vsd.priors.table import prior_row
from dist_vsd.sweep.manifest import (
    MANIFEST_FILE,
    SETTINGS_FILE,
    PlannedRun,
    Sweep,
    SweepSettings,
    read_settings,
    read_sweep,
    write_manifest,
    write_settings,
)
from dist_vsd.sweep.overrides import check_characters, flatten, resolve
from dist_vsd.sweep.prompts import Prompt
from dist_vsd.sweep.slurm import SCRIPT
from dist_vsd.view_words import VIEW_WORDS
from dist_vsd.writable import TRIAL_PREFIX

LOCK_FILE = ".plan.lock"


def distinct(prompts: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts without repetitions (of text and overrides), and those that repeat another."""
    first: dict[str, Prompt] = {}
    repeated = []
    for prompt in prompts:
        key = _key(prompt.text, prompt.overrides)
        if key in first:
            repeated.append(prompt)
        else:
            first[key] = prompt
    return list(first.values()), repeated


def expand(prompts: list[Prompt], variations: list[dict[str, Any]], seeds: list[int], settings: SweepSettings) -> list[PlannedRun]:
    """Return all runs of prompts x variations x seeds, each with a configuration that holds.

    Args:
        prompts: of a file; a prompt's own overrides win over a variation's.
        variations: overrides by dotted name, one mapping for each combination of ``--set``.
        seeds: of the runs.
        settings: of the sweep; no run is planned that its preset and number of processes do not allow.

    Raises:
        ValueError: a value of the wrong type or out of range, a prior that is not there, or words that it does not know.
    """
    checks = _Checks(settings)
    for variation in variations:
        checks.overrides(variation, "--set")
    runs: dict[str, PlannedRun] = {}
    for prompt in prompts:
        for variation in variations:
            overrides = checks.overrides(variation | prompt.overrides, prompt.source)
            checks.words(prompt, overrides)
            for seed in seeds:
                run = PlannedRun(prompt=prompt.text, seed=seed, overrides=overrides, tags=prompt.tags)
                runs.setdefault(run.id, run)
    return list(runs.values())


class _Checks:
    """What is checked of each run, once for all runs that share it: thousands of runs have a handful of configurations."""

    def __init__(self, settings: SweepSettings) -> None:
        self._preset, self._num_processes = settings.preset, settings.num_processes
        self._base = load_preset(settings.preset)
        self._resolved: dict[str, dict[str, Any]] = {}
        self._priors: dict[str, PipelineFolder | None] = {}
        self._known: set[tuple[str, str, str]] = set()

    def overrides(self, overrides: dict[str, Any], source: str) -> dict[str, Any]:
        """Return overrides as a valid configuration holds them."""
        for value in filter(lambda value: isinstance(value, str), overrides.values()):
            check_characters(value, source)
        # Negative prompts have no rule but their type, and may be as many as prompts.
        negative = overrides.get("negative_prompt")
        named = overrides if not isinstance(negative, str) else overrides | {"negative_prompt": ""}
        key = json.dumps(named)
        if key not in self._resolved:
            config, self._resolved[key] = resolve(self._base, named, source)
            self._check_layout(config, source)
            self._check_prior(config.prior, source)
        resolved = self._resolved[key]
        return resolved if named is overrides else resolved | {"negative_prompt": negative}

    def _check_layout(self, config: RunConfig, source: str) -> None:
        try:
            views_per_shot = prior_row(config.prior).views_per_shot
            Layout.of(config.num_particles, self._num_processes, 0, config.num_views, config.num_shards, views_per_shot)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    def _check_prior(self, prior: str, source: str) -> None:
        """Find a prior that is a folder; what only the hub may have is not asked for while planning."""
        if prior not in self._priors:
            try:
                self._priors[prior] = None if is_hub_id(prior) else find_pipeline(prior)
            except ValueError as error:
                completing = f"--set prior={SUGGESTED if not prior else 'PATH'}"
                where = f"preset {self._preset}, to complete with {completing}" if prior == self._base.prior else source
                raise ValueError(f"{where}: {error}") from error

    def words(self, prompt: Prompt, overrides: dict[str, Any]) -> None:
        """Refuse words that a prior with a closed vocabulary does not know, and prompts that are too long for its text encoder."""
        prior = overrides.get("prior", self._base.prior)
        negative = overrides.get("negative_prompt", self._base.negative_prompt)
        is_flat = REPRESENTATIONS[overrides.get("representation", self._base.representation)].is_flat
        has_views = not is_flat and overrides.get("prompting.view_words", self._base.prompting.view_words)
        longest = f"{prompt.text}, {max(VIEW_WORDS, key=len)}" if has_views else prompt.text
        folder = self._priors[prior]
        if folder is None or (longest, negative, prior) in self._known:
            return
        try:
            check_prompts([longest, negative], folder)
        except ValueError as error:
            raise ValueError(f"{prompt.source}: {error}") from error
        self._known.add((longest, negative, prior))


def settle(path: Path, asked: dict[str, Any]) -> SweepSettings:
    """Return the settings of the sweep in a directory, or those of a new one.

    Args:
        path: of the sweep's directory; need not exist.
        asked: settings by name; None where the user said nothing.

    Raises:
        ValueError: the sweep that is there has another setting, or the directory holds something else.
    """
    chosen = {name: value for name, value in asked.items() if value is not None}
    try:
        if not (path / SETTINGS_FILE).exists():
            foreign = [file.name for file in path.iterdir() if not _left_by_a_planner(file.name)] if path.is_dir() else []
            if path.exists() and (foreign or not path.is_dir()):
                raise ValueError(f"--sweep-dir {path} holds something else than a sweep: choose another")
            return SweepSettings(name=path.absolute().name, **chosen)
    except OSError as error:
        raise ValueError(f"--sweep-dir {str(path)[:100]} can't be used ({error.strerror}): choose another") from error
    settings = read_settings(path)
    for name, value in chosen.items():
        if getattr(settings, name) != value:
            raise ValueError(
                f"the sweep in {path} has {name} {getattr(settings, name)!r}, got {value!r}: "
                f"drop --{name.replace('_', '-')}, or plan another sweep"
            )
    return settings


def _left_by_a_planner(name: str) -> bool:
    """Say whether a file may be left by a planner that was killed before it wrote the settings, which make a directory a sweep."""
    return name in (LOCK_FILE, MANIFEST_FILE, SCRIPT) or name.startswith((f".{MANIFEST_FILE}.", f".{SETTINGS_FILE}.", TRIAL_PREFIX))


def add_runs(path: Path, settings: SweepSettings, runs: Iterable[PlannedRun]) -> tuple[Sweep, list[PlannedRun]]:
    """Add to a sweep, or make it of, the runs that it does not hold yet; the manifest is replaced whole or not at all.

    A run counts as held if its prompt, its seed and the configuration that its overrides make of the preset are.

    Args:
        path: of the sweep's directory; made if need be.
        settings: as ``settle`` returned them.
        runs: that the sweep shall hold.

    Returns:
        The sweep, and the runs that are new in it.

    Raises:
        ValueError: another planner is at work, or the directory can't be written or read.
    """
    defaults = flatten(to_mapping(load_preset(settings.preset)))
    with _locked(path):
        # The settings are written last: until then a killed planner has left no sweep, and the next one starts afresh.
        is_new = not (path / SETTINGS_FILE).exists()
        old = [] if is_new or not (path / MANIFEST_FILE).exists() else read_sweep(path).runs
        held = {_content(run, defaults) for run in old}
        new = []
        for run in runs:
            content = _content(run, defaults)
            if content not in held:
                held.add(content)
                new.append(run)
        if new:
            write_manifest(path, [*old, *new])
        if is_new:
            write_settings(path, settings)
    return Sweep(path, settings, [*old, *new]), new


def _content(run: PlannedRun, defaults: dict[str, Any]) -> str:
    """Return what a run is made of: an override that says what the preset says anyway does not count."""
    return _key(run.prompt, {name: value for name, value in run.overrides.items() if defaults.get(name) != value}, run.seed)


def _key(*content: Any) -> str:
    return json.dumps(content, sort_keys=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a sweep's directory against other planners; the system frees the lock of a planner that dies."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with open(path / LOCK_FILE, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError as error:
        raise ValueError(f"another process is planning the sweep in {path}: wait until it is done, then plan again") from error
    except OSError as error:
        raise ValueError(f"--sweep-dir {str(path)[:100]} can't be written ({error.strerror}): choose another") from error

