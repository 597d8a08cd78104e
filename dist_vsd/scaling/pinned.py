"""Run a command on a core of its own: `python -m dist_vsd.scaling.pinned train ...` is `python -m dist_vsd train ...`, pinned.

DIST_VSD_CORES lists cores ("0,1"). Rank i of this machine takes the i-th, beginning again at the first where there are more
ranks than cores; every thread that it starts stays there. Without the variable nothing is pinned.
"""

from __future__ import annotations

import os
import runpy


def core_of(local_rank: int, cores: str) -> int:
    """Return the core of a rank, out of a list such as "0,1"."""
    listed = [int(core) for core in cores.split(",")]
    return listed[local_rank % len(listed)]


def pin() -> None:
    """Bind this process to its core, if DIST_VSD_CORES says so."""
    if "DIST_VSD_CORES" in os.environ:
        os.sched_setaffinity(0, {core_of(int(os.environ.get("LOCAL_RANK", "0")), os.environ["DIST_VSD_CORES"])})


if __name__ == "__main__":
    pin()
    runpy.run_module("dist_vsd", run_name="__main__")
