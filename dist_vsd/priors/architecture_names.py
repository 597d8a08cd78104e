"""The names of Stable Diffusion's architectures, apart from the files that build them, so that a command knows them without torch."""

from __future__ import annotations

import difflib

UNET_SIZES = ("sd15", "sd21", "sdxl", "tiny")
FLOW_SIZES = ("sd3-medium", "sd35-medium", "sd35-large", "tiny-sd3")
SIZES = (*UNET_SIZES, *FLOW_SIZES)
PREFIX = "random:"


def preset_of(size: str) -> str:
    """Return the preset that an architecture of real size is rehearsed with."""
    return "stable-diffusion-3" if size in FLOW_SIZES else "stable-diffusion"


def sizes_of_pictures(size: str) -> int:
    """Return the height and width of the pictures that an architecture is rehearsed with, pixels."""
    return {"sdxl": 1024, "tiny": 16, "tiny-sd3": 16}.get(size, 512)


def is_tiny(size: str) -> bool:
    """Say whether a size is nobody's, for tests alone."""
    return size.startswith("tiny")


def is_random_prior(name: str) -> bool:
    """Say whether a prior's name asks for an architecture with random weights."""
    return name.startswith(PREFIX)


def is_random_flow(name: str) -> bool:
    """Say whether it is the architecture of a rectified flow."""
    return is_random_prior(name) and name.removeprefix(PREFIX) in FLOW_SIZES


def size_of(name: str) -> str:
    """Return the architecture in a name such as random:sd21; ValueError for one that there is not."""
    size = name.removeprefix(PREFIX)
    if size not in SIZES:
        near = difflib.get_close_matches(size, SIZES, n=1)
        meant = f" (did you mean {PREFIX}{near[0]}?)" if near else ""
        raise ValueError(f"prior {name!r} names no architecture{meant}: use {', '.join(PREFIX + size for size in SIZES)}")
    return size
