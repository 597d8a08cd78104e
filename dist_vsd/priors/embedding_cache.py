"""Embeddings of texts on disk, keyed by content: a text is embedded once, whatever run asks for it, wherever its encoder lies.

The folder is that of the environment variable DIST_VSD_CACHE, else ~/.cache/dist_vsd. It may be removed at any time; where it
can't be written, nothing is kept. It holds up to MOST_BYTES, and what was not asked for the longest goes first: ten thousand prompts with
their views, for Stable Diffusion, would be 15 GiB in a home that may have a quota.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dist_vsd.cache_folder import cache_folder
from dist_vsd.serialization import read_tensors, write_tensors

# A file that changed this short a time ago may change again within one tick of the file system's clock, its time staying the same.
RACY_SECONDS = 2.0
MOST_BYTES = 2 * 2**30
NUM_FOLDERS = 256  # that entries are dealt to, evenly, by the first two digits of their keys; each is bounded by itself


def file_digest(file: Path) -> str:
    """Return a file's sha256, in hexadecimal.

    Gigabytes take seconds, so it is kept under the file's path, size, inode and times. The time of the last change of the inode
    is among them, which, unlike that of the content, no copying program sets back.
    """
    file = file.resolve()
    status = file.stat()
    identity = [str(file), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    folder = cache_folder()
    kept = folder / "digests" / hashlib.sha256(json.dumps(identity).encode()).hexdigest() if folder else None
    if kept is not None:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if re.fullmatch("[0-9a-f]{64}", digest := kept.read_text()):
                return digest
    content = hashlib.sha256()
    with open(file, "rb") as opened:
        while chunk := opened.read(2**20):
            content.update(chunk)
    if kept is not None and time.time() - status.st_ctime > RACY_SECONDS:
        _put(kept, lambda path: path.write_text(content.hexdigest()))
    return content.hexdigest()


def read_entry(key: str) -> dict[str, Tensor] | None:
    """Return the tensors kept under a key (hexadecimal); None if there are none, or not to the bit what was put there."""
    file = _entry_file(key)
    if file is None or not file.exists():
        return None
    try:
        tensors = read_tensors(file)
    except ValueError:
        return None
    with contextlib.suppress(OSError):
        os.utime(file)
    checksum = tensors.pop("checksum", None)
    return tensors if checksum is not None and torch.equal(checksum, _checksum(key, tensors)) else None


def write_entry(key: str, tensors: dict[str, Tensor]) -> None:
    """Keep tensors under a key; where that can't be done, nothing happens."""
    file = _entry_file(key)
    if file is not None:
        _put(file, lambda path: write_tensors(tensors | {"checksum": _checksum(key, tensors)}, path))
        _bound(file.parent)


def _bound(folder: Path) -> None:
    """Remove what was not asked for the longest from one of the folders, until it is within its share of MOST_BYTES."""
    with contextlib.suppress(OSError):  # another process may do the same
        found = sorted(((file.stat(), file) for file in folder.glob("*.safetensors")), key=lambda item: -item[0].st_mtime_ns)
        total = 0
        for number, (status, file) in enumerate(found):
            total += status.st_size
            if number and total > MOST_BYTES // NUM_FOLDERS:
                file.unlink()


def _entry_file(key: str) -> Path | None:
    folder = cache_folder()
    return folder / "embeddings" / key[:2] / f"{key}.safetensors" if folder else None


def _checksum(key: str, tensors: dict[str, Tensor]) -> Tensor:
    content = hashlib.sha256(key.encode())
    for name in sorted(tensors):
        content.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        content.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(content.digest()), dtype=torch.uint8)


def _put(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside, under a name that no other process has, and rename it into place."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as beside:
            write(Path(beside) / file.name)
            (Path(beside) / file.name).replace(file)
