"""Files of a pipeline, read and checked without loading them: JSON, tokenizers, and the headers of safetensors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

# Where each component's tensors are in the original (LDM) layout: of Stable Diffusion 1.x and 2.x, and of XL.
LDM_PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")


def read_json(file: Path, prior: str, kind: str = "prior") -> dict[str, Any]:
    """Read a JSON object; ``kind`` and ``prior`` are named in errors.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{kind} {prior!r} is incomplete: {file} is missing; copy the whole folder") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{kind} {prior!r} is damaged: {file} is not readable JSON; copy it anew") from error
    if not isinstance(content, dict):
        raise ValueError(f"{kind} {prior!r} is damaged: {file} holds no JSON object; copy it anew")
    return content


def check_tokenizer(folder: Path, prior: str, kind: str = "prior") -> None:
    """Refuse a folder that holds no whole tokenizer.

    Raises:
        ValueError: naming the file.
    """
    if (folder / "tokenizer.json").exists():
        read_json(folder / "tokenizer.json", prior, kind)
        return
    read_json(folder / "vocab.json", prior, kind)
    if not (folder / "merges.txt").is_file():
        raise ValueError(f"{kind} {prior!r} is incomplete: {folder / 'merges.txt'} is missing; copy the whole folder")


def weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """Return the safetensors files of a component in one variant, whole or in shards; empty without any."""
    middle = f".{variant}" if variant else ""
    return sorted({*folder.glob(f"{stem}{middle}.safetensors"), *folder.glob(f"{stem}{middle}-*-of-*.safetensors")})


def find_variant(folder: Path, stem: str, prior: str) -> str | None:
    """Return the variant of a component's weights: None (plain), else "fp16", else "bf16".

    Raises:
        ValueError: there are none, or pickled ones alone, or a shard is missing.
    """
    for variant in (None, "fp16", "bf16"):
        files = weight_files(folder, stem, variant)
        shards = [match for match in (_SHARD.search(file.name) for file in files) if match]
        if shards and len(shards) == len(files) != int(shards[0][2]):
            raise ValueError(
                f"prior {prior!r} is incomplete: {folder} has {len(shards)} of the {int(shards[0][2])} shards of {stem}; copy it anew"
            )
        if files:
            return variant
    if any(folder.glob("*.bin")):
        raise ValueError(f"prior {prior!r} has only pickled weights in {folder}: nothing is unpickled here, convert them to safetensors")
    raise ValueError(f"prior {prior!r} is incomplete: no {stem}.safetensors in {folder}; copy the whole pipeline folder")


def read_shapes(files: list[Path], prior: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by the headers of safetensors files.

    Raises:
        ValueError: a file can't be read, or is shorter than its header says.
    """
    shapes = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - no iterator
        except (SafetensorError, OSError) as error:
            raise ValueError(f"prior {prior!r} is damaged: {file} can't be read ({error}); copy it anew") from error
    return shapes
