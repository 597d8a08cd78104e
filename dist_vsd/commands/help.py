"""The pages of --help: everyday flags on one screen, and with --help-all every flag by topic. Texts are the fields' docstrings."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

import tyro

HELP_FLAGS = ("-h", "--help", "--help-all")
WIDEST, TEXT_COLUMN, SCREEN_LINES, MOST_LINES = 120, 28, 40, 3
KINDS = {int: "N", float: "X", str: "TEXT", bool: ""}
OTHERS = "Others"


@dataclasses.dataclass(frozen=True)
class Pages:
    """How a command's flags are shown.

    Attributes:
        examples: lines to begin with.
        everyday: flags of --help, in this order.
        topics: titles of --help-all, each with its flags and sections, as "--num-particles" and "--score.".
    """

    examples: str
    everyday: tuple[str, ...]
    topics: dict[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag as help shows it.

    Attributes:
        name: with its dashes.
        values: what follows it.
        text: its docstring, on one line.
        default: as it would be typed; empty for none.
        section: its section's docstring; empty outside of one.
    """

    name: str
    values: str
    text: str
    default: str
    section: str = ""

    @property
    def head(self) -> str:
        """The flag and what follows it."""
        return f"{self.name} {self.values}".strip()

    @property
    def whole(self) -> str:
        """All of its text, with the default."""
        return f"{self.text} ({self.default})".strip() if self.default else self.text

    @property
    def short(self) -> str:
        """Its first clause, with the default."""
        flat = re.sub(r"\([^()]*\)", lambda within: "_" * len(within[0]), self.text)  # what stands in brackets ends no clause
        first = self.text[: len(re.split(r"[.;:] ", flat)[0])].rstrip(".")
        return f"{first} ({self.default})" if self.default else first


def short_page(command: str, kind: type, default: Any, pages: Pages) -> str:
    """Return what --help prints: at most a screen, with first clauses alone where whole texts would take more.

    Args:
        command: its name.
        kind: dataclass of its arguments.
        default: an instance with the defaults.
        pages: of the command.
    """
    flags = {flag.name: flag for flag in flags_in(kind, default)}
    head = [f"usage: dist-vsd {command} {_positional(kind)}[OPTIONS]", "", *pages.examples.splitlines(), ""]
    count, topics = len(flags) - len(pages.everyday), ", ".join(title[0].lower() + title[1:] for title in pages.topics)
    end = ["", *textwrap.wrap(f"--help-all explains these and {count} more flags, by topic: {topics}.", _width())]
    shown = [flags[name] for name in pages.everyday]
    whole = [row for flag in shown for row in _rows(flag.head, flag.whole)]
    short = [row for flag in shown for row in _rows(flag.head, flag.short, MOST_LINES)]
    return "\n".join([*head, *(whole if len(head) + len(whole) + len(end) <= SCREEN_LINES else short), *end])


def long_page(command: str, kind: type, default: Any, pages: Pages, description: str) -> str:
    """Return what --help-all prints: every flag, by topic.

    Args:
        command: its name.
        kind: dataclass of its arguments.
        default: an instance with the defaults.
        pages: of the command.
        description: of the command.
    """
    lines = [f"usage: dist-vsd {command} {_positional(kind)}[OPTIONS]", "", *description.splitlines()]
    for title, flags in by_topic(kind, default, pages).items():
        lines += ["", f"{title}:"]
        section = ""
        for flag in flags:
            if flag.section and flag.section != section:
                lines += ["", *textwrap.wrap(flag.section, _width(), initial_indent="  ", subsequent_indent="  ")]
            section = flag.section
            lines += _rows(flag.head, flag.whole)
    return "\n".join(lines)


def by_topic(kind: type, default: Any, pages: Pages) -> dict[str, list[Flag]]:
    """Return all flags of a command by the title that they stand under; OTHERS for those that no topic names."""
    found: dict[str, list[Flag]] = {title: [] for title in pages.topics}
    flags = list(flags_in(kind, default))
    for title, names in pages.topics.items():
        for name in names:
            found[title] += [flag for flag in flags if flag.name == name or (name.endswith(".") and flag.name.startswith(name))]
    told = {flag.name for flags_of_topic in found.values() for flag in flags_of_topic}
    others = [flag for flag in flags if flag.name not in told]
    return found | ({OTHERS: others} if others else {})


def flags_in(kind: type, default: Any, prefix: str = "--", section: str = "") -> Iterator[Flag]:
    """Yield the flags of a dataclass and the sections in it.

    Args:
        kind: the dataclass.
        default: an instance with the defaults; None where the fields have their own.
        prefix: of its flags.
        section: its docstring, for a section.
    """
    hints, texts = typing.get_type_hints(kind, include_extras=True), docstrings_of(kind)
    sections = []
    for field in dataclasses.fields(kind):
        notes = getattr(hints[field.name], "__metadata__", ())
        plain = typing.get_args(hints[field.name])[0] if notes else hints[field.name]
        value = getattr(default, field.name) if default is not None else field.default
        given = [note.name for note in notes if isinstance(getattr(note, "name", None), str)]  # by tyro.conf.arg(name=...)
        name = prefix + (given[0] if given else field.name.replace("_", "-"))
        if dataclasses.is_dataclass(plain):
            inner = prefix if given == [""] else f"{name}."
            sections.append((plain, value, inner, section if given == [""] else " ".join((plain.__doc__ or "").split())))
        elif not is_marked(notes, tyro.conf.Positional) and not is_marked(notes, tyro.conf.Suppress):
            is_on = plain is bool and value is True
            shown = name if not is_on else f"{prefix}no-{name.removeprefix(prefix)}"
            text = texts.get(field.name, "")
            yield Flag(shown, _values(plain), f"Switches off: {text}" if is_on else text, _default(value), section)
    for inner_section in sections:
        yield from flags_in(*inner_section)


@functools.cache
def docstrings_of(kind: type) -> dict[str, str]:
    """Return the docstrings under the fields of a dataclass and of those that it inherits from, each on one line."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        try:
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError):  # made without a source
            continue
        body = definition.body if isinstance(definition, ast.ClassDef) else []
        for field, after in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
                texts[field.target.id] = " ".join(str(getattr(after.value, "value", "")).split())
    return texts


def is_marked(notes: tuple[Any, ...], marker: Any) -> bool:
    """Say whether the notes of a field's annotation have one of tyro's markers, such as tyro.conf.Positional."""
    return marker[int].__metadata__[0] in notes


def _positional(kind: type) -> str:
    """Return the words that a command takes without a flag."""
    hints = typing.get_type_hints(kind, include_extras=True)
    words = []
    for field in dataclasses.fields(kind):
        notes = getattr(hints[field.name], "__metadata__", ())
        plain = typing.get_args(hints[field.name])[0] if notes else hints[field.name]
        if dataclasses.is_dataclass(plain):
            words.append(_positional(plain).strip())
        elif is_marked(notes, tyro.conf.Positional):
            word = field.name.upper().removesuffix("S") if typing.get_origin(plain) is tuple else f'"{field.name.upper()}"'
            words.append(f"{word} [{word} ...]" if typing.get_origin(plain) is tuple else word)
    return "".join(f"{word} " for word in words if word)


def _values(plain: Any) -> str:
    """Return what follows a flag of this type."""
    options = [option for option in typing.get_args(plain) if option is not type(None)]
    if typing.get_origin(plain) is tuple:
        items = [KINDS[option] for option in options if option is not Ellipsis]
        return f"{items[0]} [{items[0]} ...]" if Ellipsis in options else " ".join(items)
    return KINDS[options[0] if options else plain]


def _default(value: Any) -> str:
    """Return a default as it would be typed."""
    if isinstance(value, bool) or value in ("", None) or value is dataclasses.MISSING:
        return ""
    values = value if isinstance(value, tuple) else (value,)
    return " ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in values)


def _width() -> int:
    return min(WIDEST, shutil.get_terminal_size((100, 24)).columns)


def _rows(head: str, text: str, most_lines: int | None = None) -> list[str]:
    """Lay a flag and its text out in two columns; a long flag has a line of its own."""
    wrapped = textwrap.wrap(text, _width() - TEXT_COLUMN, max_lines=most_lines, placeholder=" ...", break_on_hyphens=False) or [""]
    head = f"  {head}"
    rows = [head] if len(head) >= TEXT_COLUMN else [f"{head:<{TEXT_COLUMN}}{wrapped.pop(0)}".rstrip()]
    return [*rows, *(" " * TEXT_COLUMN + line for line in wrapped)]
