"""A benchmark's prompts, from a file that the user has: a prompt a line, or a list in JSON."""

from __future__ import annotations

import difflib
import json
from pathlib import Path


def read_prompt_set(file: Path) -> tuple[str, ...]:
    """Return the prompts of a file in its order, by which GPTEval3D numbers them.

    Args:
        file: .json: a list of texts, as GPTEval3D's prompts.json; else a prompt a line, as T3Bench's; empty lines are skipped.

    Raises:
        ValueError: it can't be read, or holds no prompt, one twice, or something else.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        found = json.loads(text) if file.suffix == ".json" else [line for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--prompts {file} can't be read ({type(error).__name__}): check the path, and what it holds") from error
    if not isinstance(found, list) or not all(isinstance(prompt, str) and prompt.strip() for prompt in found):
        raise ValueError(f"--prompts {file} must be a JSON list of texts: give the benchmark's own file, or a prompt a line as .txt")
    prompts = tuple(prompt.strip() for prompt in found)
    if not prompts:
        raise ValueError(f"--prompts {file} holds no prompt: give the benchmark's own file")
    if twice := [prompt for prompt in prompts if prompts.count(prompt) > 1]:
        raise ValueError(f"--prompts {file} holds {twice[0][:60]!r} twice: take one out")
    return prompts


def place_of(prompt: str, prompts: tuple[str, ...], whose: str, file: str) -> int:
    """Return the place of a run's prompt among a benchmark's, from 0.

    Args:
        prompt: of the run.
        prompts: the benchmark's.
        whose: the run, for the message.
        file: that the prompts come from, for the message.

    Raises:
        ValueError: it is none of them.
    """
    if prompt in prompts:
        return prompts.index(prompt)
    near = difflib.get_close_matches(prompt, prompts, n=1)
    meant = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"{whose} has the prompt {prompt[:60]!r}, which --prompts {file} has not{meant}: leave the run out, or add the prompt")
