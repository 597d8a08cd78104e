"""Whether a folder or a file can be written, found out by writing there, before any work is done for it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

# Of what a trial leaves if its process is killed within it; whoever asks whether a folder is empty passes it over.
TRIAL_PREFIX = ".dist_vsd_trial_"


def require_writable_folder(folder: Path, named: str, change: str = "choose another") -> None:
    """Refuse a folder that could not be made or written.

    The system's own word (os.access) is not enough: it says yes to root, in /proc, and on a disk that is full.

    Args:
        folder: that shall be written.
        named: what the user called it, for the message.
        change: what to do instead, for the message.

    Raises:
        ValueError: something in the way is no folder, or a file can't be made in it.
    """
    reason = _why_not(folder)
    if reason:
        raise ValueError(f"{named[:100]} can't be written ({reason}): {change}")


def require_writable_file(file: Path, named: str, change: str = "choose another") -> None:
    """Refuse a file that could not be made or replaced.

    Args:
        file: that shall be written; it keeps its content.
        named: what the user called it, for the message.
        change: what to do instead, for the message.

    Raises:
        ValueError: it is a folder, or refuses, or its folder does.
    """
    try:
        if file.is_dir():
            raise ValueError(f"{named[:100]} is a folder: {change} file")
        if file.exists():
            os.close(os.open(file, os.O_WRONLY | os.O_APPEND))
    except OSError as error:
        raise ValueError(f"{named[:100]} can't be written ({error.strerror}): {change}") from error
    require_writable_folder(file.absolute().parent, named, change)


def _why_not(folder: Path) -> str:
    """Return why nothing can be written into a folder that may have to be made; empty if it can."""
    where = folder
    try:
        where = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
        if not where.is_dir():
            return f"{where} is a file"
        with contextlib.ExitStack() as stack:
            inside = where
            if where != folder:  # a folder will be made there: some file systems take files alone, others folders alone
                inside = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=TRIAL_PREFIX, dir=where)))
            with tempfile.NamedTemporaryFile(prefix=TRIAL_PREFIX, dir=inside) as file:
                file.write(b"\n")  # a full disk still makes empty files
    except OSError as error:
        return f"{str(where)[:60]} takes no new files: {error.strerror or type(error).__name__}"
    return ""
