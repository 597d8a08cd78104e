"""Tensors on disk: safetensors only, written beside and renamed into place."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write named tensors so that ``file`` holds either its old or its whole new content, whatever happens.

    Raises:
        OSError: the disk is full or the folder can't be written; a half-written temporary file is removed.
    """
    temporary = file.with_name(file.name + ".tmp")
    contiguous = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, temporary)
        with open(temporary, "rb+") as opened:
            os.fsync(opened.fileno())
        temporary.replace(file)
    except SafetensorError as error:  # safetensors reports a full disk as its own error
        temporary.unlink(missing_ok=True)
        raise OSError(f"can't write {file}: {error}") from error
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    Raises:
        ValueError: the file is missing, truncated or not a safetensors file.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} can't be read as safetensors ({error}): restore or remove it") from error
