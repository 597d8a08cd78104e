"""The names of Stable Diffusion's architectures, apart from architectures.py, so that a command knows them without importing torch."""

from __future__ import annotations

import difflib

SIZES = ("sd15", "sd21", "sdxl", "tiny")
PREFIX = "random:"


def is_random_prior(name: str) -> bool:
    """Say whether a prior's name asks for an architecture with random weights."""
    return name.startswith(PREFIX)


def size_of(name: str) -> str:
    """Return the architecture in a name such as random:sd21; ValueError for one that there is not."""
    size = name.removeprefix(PREFIX)
    if size not in SIZES:
        near = difflib.get_close_matches(size, SIZES, n=1)
        meant = f" (did you mean {PREFIX}{near[0]}?)" if near else ""
        raise ValueError(f"prior {name!r} names no architecture{meant}: use {', '.join(PREFIX + size for size in SIZES)}")
    return size
