"""Parsing a command's flags with tyro, so that a wrong one is told in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import re
import typing
from collections.abc import Iterable
from typing import Any

import tyro

from dist_vsd.commands.help import HELP_FLAGS, Pages, is_marked, long_page, short_page
from dist_vsd.config_files import RENAMED

_BOX = re.compile(r"[╭╮╰╯│─]+")
# How tyro introduces a rule that one of our dataclasses told: by the name of a class or a field that users never see.
_INNER_NAME = re.compile(r"^Error parsing (run[\w.-]*|\w+Arguments): ")


def parse(kind: type, arguments: list[str], command: str, description: str, default: Any = None, pages: Pages | None = None) -> Any:
    """Parse flags into a dataclass.

    Args:
        kind: the dataclass; its fields' docstrings are the help texts.
        arguments: of the command line, after the command.
        command: its name, for the usage line.
        description: for the help text.
        default: an instance that holds the defaults.
        pages: of a command with more flags than a screen has lines.

    Raises:
        ValueError: an unknown flag, a missing or wrong value, or a rule of the dataclass.
        SystemExit: after printing help.
    """
    asked = [word for word in arguments if word in HELP_FLAGS]
    if asked and pages is not None:
        is_long = "--help-all" in asked
        print(long_page(command, kind, default, pages, description) if is_long else short_page(command, kind, default, pages))
        raise SystemExit(0)
    arguments = ["--help" if word == "--help-all" else word for word in arguments]
    flags = flags_of(kind)
    for word in arguments:
        old = word.partition("=")[0].replace("_", "-")
        new = "--" + RENAMED.get(old.removeprefix("--").replace("-", "_"), "").replace("_", "-")
        if new in flags and old not in flags:
            raise ValueError(f"{old} is {new} since version 0.5: use that")
    captured = io.StringIO()
    extra = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(kind, args=spell_out(arguments, flags), prog=f"dist-vsd {command}", description=description, **extra)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        help_flag = "--help" if pages is None else "--help-all"
        raise ValueError(f"{_one_line(captured.getvalue(), arguments)}: see dist-vsd {command} {help_flag}") from None


def flags_of(kind: type, prefix: str = "--") -> dict[str, Any]:
    """Return the type of each flag of a nested dataclass, by the flag as it is written with dashes."""
    flags: dict[str, Any] = {}
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        notes = getattr(hint, "__metadata__", ())
        given = [note.name for note in notes if isinstance(getattr(note, "name", None), str)]
        plain = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
        name = prefix + (given[0] if given else field.name.replace("_", "-"))
        if dataclasses.is_dataclass(plain):
            flags |= flags_of(plain, prefix if given == [""] else f"{name}.")
        elif not is_marked(notes, tyro.conf.Suppress):
            flags[name] = plain
    return flags


def spell_out(arguments: list[str], flags: dict[str, Any]) -> list[str]:
    """Write ``--flag=True``, ``--flag=False`` and ``--flag=[1, 2]``, as wandb's agents give them, in the words that tyro takes.

    Args:
        arguments: of the command line.
        flags: the type of each.
    """
    words = []
    for argument in arguments:
        flag, _, value = argument.partition("=")
        flag = flag.replace("_", "-")
        kind = flags.get(flag)
        if kind is bool and value.lower() in ("true", "false"):
            section, dot, name = flag.removeprefix("--").rpartition(".")
            words.append(flag if value.lower() == "true" else f"--{section}{dot}no-{name}")
        elif typing.get_origin(kind) is tuple and value.startswith("["):
            words += [flag, *_items(value)]
        else:
            words.append(argument)
    return words


def _items(value: str) -> list[str]:
    """Return the items of a list in JSON, as text; the text itself if it is none."""
    try:
        return [str(item) for item in json.loads(value)]
    except ValueError:
        return [value]


def _one_line(text: str, arguments: list[str]) -> str:
    """Condense tyro's box: its first sentence, and the flags that it thinks were meant."""
    rows = [_BOX.sub("", row).strip() for row in text.splitlines()]
    rows = [row for row in rows if row]
    title_dropped = rows[1:] if len(rows) > 1 else rows
    end = next((i for i, row in enumerate(title_dropped) if row.startswith(("Perhaps", "Argument helptext", "For full", "Are you"))), None)
    message = " ".join(title_dropped[:end]).rstrip(":.")
    message = _INNER_NAME.sub("", message)
    meant = re.findall(r"(--[\w.-]+)", " ".join(title_dropped[end:])) if "Unrecognized" in message and end is not None else []
    meant = [flag for flag in dict.fromkeys(meant) if flag != "--help"][:3]
    hint = f" (did you mean {' or '.join(meant)}?)" if meant else ""
    if message.startswith("Unrecognized options:") and "-" not in message:
        word = message.removeprefix("Unrecognized options:").strip()
        flags = [argument for argument in arguments if argument.startswith("--") and argument.endswith(f"={word}")]
        hint = f" ({flags[0].partition('=')[0]} takes no value)" if flags else " (a prompt of several words needs quotes)"
    return f"{message}{hint}"


def nearest_command(word: str, names: Iterable[str]) -> str:
    """Return " (did you mean x?)" for a mistyped command, or nothing."""
    near = difflib.get_close_matches(word, list(names), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
