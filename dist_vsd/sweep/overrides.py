"""Overrides of a run's configuration by dotted name: what they are called, how they are written as text, and what they resolve to.

As text (``--set``, a column of a CSV file) a value is written as in JSON: ``8``, ``1e-3``, ``true``, ``[2.6,3.2]``. Text needs no
quotes, unless it holds a comma in ``--set`` or begins with a quote: ``"ugly, blurry"``.
"""

from __future__ import annotations

import itertools
import json
import operator
import re
from typing import Any

from dist_vsd.config import RunConfig, nearest
from dist_vsd.config_files import merge, to_mapping
from dist_vsd.sweep.manifest import nest

# What a sweep itself says of each of its runs.
TAKEN = {
    "prompt": "prompts come from the prompt file",
    "prompt_file": "prompts come from the prompt file",
    "seed": "seeds come from --seeds",
    "run_dir": "the sweep chooses run directories",
    "resume": "the sweep resumes its runs by itself",
}
_VALUE = re.compile(r'(?:^|,)("(?:[^"\\]|\\.)*"|\[[^\]]*\]|[^,]*)(?=,|$)', re.DOTALL)


def flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as one of dotted names."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


_DEFAULTS = flatten(to_mapping(RunConfig()))
_GROUPS = {name.rpartition(".")[0] for name in _DEFAULTS} - {""}


def field_name(word: str, source: str) -> str:
    """Return the dotted name of a field, which may be written with dashes as on the command line.

    Raises:
        ValueError: there is no such field (nearest names given), it is a group of fields, or it is the sweep's to choose.
    """
    name = word.strip().removeprefix("--").replace("-", "_")
    if name in TAKEN:
        raise ValueError(f"{source}: {name} can't be set: {TAKEN[name]}")
    if name in _GROUPS:
        fields = [field for field in _DEFAULTS if field.startswith(f"{name}.")]
        raise ValueError(f"{source}: {name} is a group: set a field of it, as in {fields[0]}")
    if name not in _DEFAULTS:
        raise ValueError(f"{source}: unknown key {name!r}{nearest(name, _DEFAULTS)}: rename or remove it")
    return name


def value_of(name: str, text: str) -> Any:
    """Return the value that a text stands for; its type and range are checked by ``resolve``."""
    default, text = _DEFAULTS[name], text.strip()
    if isinstance(default, str) and not text.startswith('"'):
        return text
    if isinstance(default, bool):
        text = text.lower()
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_assignment(text: str) -> tuple[str, list[Any]]:
    """Read ``name=value,value,...`` of ``--set``.

    Raises:
        ValueError: it is not an assignment, or has a value twice.
    """
    source = f"--set {text[:60]}"
    name, equals, values = text.partition("=")
    if not equals:
        raise ValueError(f"{source}: must be name=value or name=value,value, as in --set objective=vsd,sds")
    name = field_name(name, source)
    found = [value_of(name, match[1]) for match in _VALUE.finditer(values)]
    if len({json.dumps(value) for value in found}) < len(found):
        raise ValueError(f"{source}: a value stands there twice: drop one")
    return name, found


def read_variations(assignments: list[str], together: list[list[str]]) -> list[dict[str, Any]]:
    """Return what ``--set`` and ``--set-together`` make of a run: a mapping for each combination.

    Args:
        assignments: ``name=value,value``; every value meets every value of the others.
        together: lists of assignments of as many values each; the first values go together, the second ones, and so on.

    Raises:
        ValueError: a wrong assignment, a name that is set twice, or numbers of values that differ.
    """
    axes: list[list[dict[str, Any]]] = []
    for words in [*([word] for word in assignments), *together]:
        named = [read_assignment(word) for word in words]
        counts = [len(values) for _, values in named]
        if len(set(counts)) > 1:
            raise ValueError(f"--set-together {' '.join(words)[:80]}: the names have {counts} values: give each as many")
        names = [name for name, _ in named]
        for name in names:
            if names.count(name) > 1 or any(name in axis[0] for axis in axes):
                raise ValueError(f"--set: {name} is set twice: give all its values at once, as in {name}=A,B")
        axes.append([dict(zip(names, values, strict=True)) for values in zip(*(values for _, values in named), strict=True)])
    return [{name: value for part in parts for name, value in part.items()} for parts in itertools.product(*axes)]


def resolve(base: RunConfig, overrides: dict[str, Any], source: str) -> tuple[RunConfig, dict[str, Any]]:
    """Return the configuration that overrides make of another one, and the overrides as it holds them (7 as 7.0 where it is a real).

    Raises:
        ValueError: a value of the wrong type or out of range; the message begins with ``source``.
    """
    config = merge(base, nest(overrides), source)
    held = {name: operator.attrgetter(name)(config) for name in overrides}
    return config, {name: list(value) if isinstance(value, tuple) else value for name, value in held.items()}


def check_characters(text: str, source: str) -> None:
    """Refuse halves of characters (lone surrogates), which JSON and command lines can hold and no file can; ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{source}: holds half a character ({ascii(text[error.start])}): write the whole one") from error
