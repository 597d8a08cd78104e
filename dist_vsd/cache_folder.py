"""Where what can be made again is kept for this user: text embeddings, digests, compiled code."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """Return the folder, of DIST_VSD_CACHE or ~/.cache/dist_vsd, which may be removed at any time; None without a home."""
    try:
        return Path(os.environ.get("DIST_VSD_CACHE") or "~/.cache/dist_vsd").expanduser()
    except RuntimeError:
        return None
