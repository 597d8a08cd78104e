"""Files of prompts: one a line (.txt), tables (.csv) or JSON lines (.jsonl).

    .txt      a green duck
    .csv      prompt,negative_prompt,tags,score.rank        any other column is an override by its dotted name; an empty cell is none
              a green duck,,"animals,small",8
    .jsonl    {"prompt": "a green duck", "negative_prompt": "ugly", "tags": ["animals"], "overrides": {"score.rank": 8}}

A prompt is any text; spaces around it are dropped, as `dist-vsd train` does.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_vsd.config import nearest
from dist_vsd.sweep.overrides import check_characters, field_name, value_of

KEYS = ("prompt", "negative_prompt", "tags", "overrides")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt of a file.

    Attributes:
        text: the prompt.
        source: file and line, for messages.
        overrides: by dotted name, the negative prompt among them; their values are not checked yet.
        tags: the user's.
    """

    text: str
    source: str
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    tags: tuple[str, ...] = ()


def read_prompts(file: Path) -> list[Prompt]:
    """Read a file of prompts, of the kind that its name ends with; empty lines are skipped.

    Raises:
        ValueError: it can't be read, holds no prompt, or a line of it is wrong.
    """
    readers = {".txt": _read_lines, ".csv": _read_table, ".jsonl": _read_json_lines}
    if file.suffix.lower() not in readers:
        raise ValueError(f"prompts must be a file that ends with .txt, .csv or .jsonl, got {str(file)[:100]!r}: rename it")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        hint = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "check the path"
        raise ValueError(f"prompts {str(file)[:100]} can't be read ({type(error).__name__}): {hint}") from error
    prompts = list(readers[file.suffix.lower()](text, file.name))
    if not prompts:
        raise ValueError(f"prompts {file} holds no prompt: write some into it, one a line")
    return prompts


def _read_lines(text: str, name: str) -> Iterator[Prompt]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield Prompt(text=line.strip(), source=f"{name}, line {number}")


def _read_table(text: str, name: str) -> Iterator[Prompt]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] = []
    while True:
        source = f"{name}, line {rows.line_num + 1}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{source}: not a row of a table ({error}): mend it") from error
        if not any(cell.strip() for cell in row):
            continue
        if not columns:
            columns = _columns(row, source)
            continue
        if len(row) > len(columns):
            raise ValueError(f"{source}: has {len(row)} cells, the table {len(columns)} columns: put text with commas into quotes")
        cells = {column: cell.strip() for column, cell in zip(columns, row, strict=False) if cell.strip()}
        tags = tuple(filter(None, (tag.strip() for tag in cells.pop("tags", "").split(","))))
        prompt = _checked_prompt(cells.pop("prompt", ""), source)
        yield Prompt(text=prompt, source=source, overrides={column: value_of(column, cell) for column, cell in cells.items()}, tags=tags)


def _columns(row: list[str], source: str) -> list[str]:
    """Return the names of a table's columns, overrides as dotted names."""
    columns = [cell.strip() for cell in row]
    if "prompt" not in columns:
        raise ValueError(f"{source}: a table needs a column named prompt, got {', '.join(columns)[:100]!r}: name it in the first line")
    columns = [column if column in ("prompt", "tags") else field_name(column, source) for column in columns]
    twice = [column for column in columns if columns.count(column) > 1]
    if twice:
        raise ValueError(f"{source}: two columns are named {twice[0]}: drop one")
    return columns


def _read_json_lines(text: str, name: str) -> Iterator[Prompt]:
    for number, line in enumerate(text.split("\n"), 1):
        source = f"{name}, line {number}"
        if line.strip():
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{source}: is not JSON ({str(error)[:80]}): mend it") from error
            if not isinstance(values, dict):
                raise ValueError(f'{source}: must be an object, as in {{"prompt": "a green duck"}}, got {line.strip()[:40]!r}')
            yield _prompt_of(values, source)


def _prompt_of(values: dict[str, Any], source: str) -> Prompt:
    for key in values:
        if key not in KEYS:
            raise ValueError(f"{source}: unknown key {key!r}{nearest(key, KEYS)}: use {', '.join(KEYS)}")
    tags, overrides = values.get("tags", []), values.get("overrides", {})
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"{source}: tags must be a list of texts, got {str(tags)[:60]!r}")
    if not isinstance(overrides, dict):
        raise ValueError(f"{source}: overrides must be an object of dotted names, got {str(overrides)[:60]!r}")
    named = {field_name(key, source): value for key, value in overrides.items()}
    if "negative_prompt" in values:
        named["negative_prompt"] = values["negative_prompt"]
    for tag in tags:
        check_characters(tag, source)
    return Prompt(text=_checked_prompt(values.get("prompt"), source), source=source, overrides=named, tags=tuple(tags))


def _checked_prompt(prompt: Any, source: str) -> str:
    if not isinstance(prompt, str):
        raise ValueError(f"{source}: prompt must be text, got {prompt!r}")
    if not prompt.strip():
        raise ValueError(f"{source}: the prompt is empty: write one, or take the line out")
    check_characters(prompt, source)
    return prompt.strip()
