"""Configurations as nested mappings: presets, YAML files, merging, comparing.

Precedence: preset < YAML file < flags. Every source is checked against the same fields and types.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from dist_vsd.config import RunConfig, nearest

PRESET_FOLDER = Path(__file__).parent / "presets"
DEFAULT_PRESET = "embedded"
# Fields of a configuration that may differ between the run that saved and the run that goes on: they don't touch the
# trajectory of theta and phi, or (how the work is laid out) only by the rounding of sums. num_updates does: schedules that are
# fractions of the whole go on from where the new whole has them, and a run that changes it says so.
FREE_ON_RESUME = {
    "resume", "run_dir", "prompt_file", "num_updates", "start_from", "init_mesh",
    "checkpoint_every", "keep_checkpoints", "log_every", "check_every", "preview_every",
    "num_shards", "micro_batch_size", "attention", "compile", "particles.offload", "score.recompute", "field.tile_points",
    "turntables", "evaluate_clip",
    "wandb.mode", "wandb.project", "wandb.entity", "wandb.group", "wandb.name", "wandb.tags",
}  # fmt: skip


# Keys of version 0.4, and what says the same now.
RENAMED = {"media_every": "preview_every", "evaluate_every": "preview_every"}


def preset_names() -> list[str]:
    """Return the names of the presets that ship with the package."""
    return sorted(file.stem for file in PRESET_FOLDER.glob("*.yaml"))


def load_preset(name: str) -> RunConfig:
    """Return a preset's configuration; ValueError for an unknown name."""
    if name not in preset_names():
        raise ValueError(f"preset {name!r} does not exist{nearest(name, preset_names())}: use one of {', '.join(preset_names())}")
    return merge(RunConfig(), read_yaml(PRESET_FOLDER / f"{name}.yaml"), f"preset {name}")


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML mapping; ValueError if the file is missing, malformed or holds something else."""
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"configuration {file} can't be read ({error.__class__.__name__}): check the path") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"configuration {file} is not valid YAML{where}: {getattr(error, 'problem', 'unreadable')}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"configuration {file} must hold 'key: value' lines, got a {type(content).__name__}")
    return content


def read_saved(file: Path) -> dict[str, Any]:
    """Read the configuration that a run has saved, without what an older version had and this one has not; ValueError as read_yaml."""
    return {key: value for key, value in read_yaml(file).items() if key not in RENAMED}


# A sweep merges thousands of configurations.
_type_hints = functools.cache(typing.get_type_hints)


def merge(config: Any, values: dict[str, Any], source: str, prefix: str = "") -> Any:
    """Return a dataclass with values of a nested mapping put in, checked by name and type.

    Args:
        config: a frozen dataclass of this package.
        values: nested mapping; a missing key keeps its value.
        source: named in errors.
        prefix: dotted path of ``config`` within the run's configuration.

    Raises:
        ValueError: an unknown key (nearest names given) or a value of the wrong type.
    """
    hints = _type_hints(type(config))
    changes = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in RENAMED:
            raise ValueError(f"{source}: {name!r} is {RENAMED[name]!r} since version 0.5: rename it")
        if key not in hints:
            raise ValueError(f"{source}: unknown key {name!r}{nearest(str(key), hints)}: remove or rename it")
        current = getattr(config, key)
        if key == "stages" and isinstance(config, RunConfig):
            changes |= _checked_stages(value, source) | ({"num_updates": values["num_updates"]} if "num_updates" in values else {})
        elif dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise ValueError(f"{source}: {name} must hold keys of its own, got {value!r}")
            changes[key] = merge(current, value, source, f"{name}.")
        else:
            changes[key] = _checked(value, hints[key], f"{source}: {name}")
    try:
        return dataclasses.replace(config, **changes)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _checked_stages(value: Any, source: str) -> dict[str, Any]:
    """Return stages (training/stages.py) with the number of updates that they make in all."""
    if not isinstance(value, dict) or not all(isinstance(changes, dict) for changes in value.values()):
        raise ValueError(f"{source}: stages must map names to what each changes, got {value!r}: write coarse: {{num_updates: 400}}")
    counts = [changes.get("num_updates") for changes in value.values()]
    return {"stages": value} | ({"num_updates": sum(counts)} if counts and all(isinstance(count, int) for count in counts) else {})


def _checked(value: Any, hint: Any, name: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if origin is tuple:
        item = typing.get_args(hint)
        if isinstance(value, (list, tuple)) and (item[-1] is Ellipsis or len(value) == len(item)):
            return tuple(_checked(v, item[0], name) for v in value)
        wanted = "a list" if item[-1] is Ellipsis else f"a list of {len(item)}"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{name} must be of type {hint.__name__}, got {value!r}")
    return value


def to_mapping(config: Any) -> dict[str, Any]:
    """Return a configuration as nested plain values, tuples as lists."""
    plain = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_mapping(value)
        plain[field.name] = list(value) if isinstance(value, tuple) else value
    return plain


def to_yaml(config: RunConfig) -> str:
    """Write a configuration as YAML."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True)


def differences(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return (dotted name, value in one, value in other) wherever two nested mappings differ."""
    found = []
    for key in dict.fromkeys([*one, *other]):
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found


def config_fingerprint(config: RunConfig) -> str:
    """Return a hash of what in a configuration determines the trajectory; a checkpoint belongs to the runs that share it.

    Only what differs from the defaults counts, so that a later version's new fields don't disown older checkpoints.
    """
    chosen = {name: value for name, _, value in differences(to_mapping(RunConfig()), to_mapping(config)) if name not in FREE_ON_RESUME}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
