"""What a measurement runs on: cores or GPUs for its ranks, what else keeps them busy, and the commit of the code."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Places:
    """Where ranks run, one a place.

    Attributes:
        kind: "core" or "GPU".
        ids: of the cores or GPUs.
        pinned: whether ranks are bound to them.
    """

    kind: str
    ids: tuple[str, ...]
    pinned: bool = True

    @staticmethod
    def of_this_machine(num_gpus: int) -> Places:
        """Return the GPUs if there are any, else the physical cores that this process may use."""
        if num_gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            return Places("GPU", tuple(visible.split(",")) if visible else tuple(map(str, range(num_gpus))))
        if not hasattr(os, "sched_getaffinity"):  # not Linux
            return Places("core", tuple(map(str, range(os.cpu_count() or 1))), pinned=False)
        return Places("core", tuple(map(str, physical_cores(os.sched_getaffinity(0)))))

    def environment(self, first: int) -> dict[str, str]:
        """Return the variables that put the ranks of a run on the places from ``first`` on."""
        if not self.pinned:
            return {}
        ids = ",".join(self.ids[first:] + self.ids[:first])
        return {"DIST_VSD_CORES" if self.kind == "core" else "CUDA_VISIBLE_DEVICES": ids}


def physical_cores(cpus: Iterable[int]) -> list[int]:
    """Return one of the hardware threads of each core: two ranks on one core would share it."""
    first: dict[str, int] = {}
    for cpu in sorted(cpus):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        first.setdefault(siblings.read_text() if siblings.exists() else str(cpu), cpu)
    return list(first.values())


def describe_machine(places: Places) -> str:
    """Return what was measured on, in one line."""
    model, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = named[0].partition(":")[2].strip() if named else model
    pinned = "" if places.pinned else ", ranks not pinned"
    return f"{len(places.ids)} {places.kind}(s){pinned}, {model}, {platform.system()} {platform.machine()}"


class OtherPrograms:
    """Watches how busy other programs keep the cores that this process may use; Linux tells, others don't."""

    def __init__(self) -> None:
        self._begin = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Return (wall, busy on our cores, used by us and our finished children), seconds."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        names = {f"cpu{cpu}" for cpu in os.sched_getaffinity(0)}
        rows = [line.split() for line in stat.read_text().splitlines()]
        # user, nice, system, (idle, iowait,) irq, softirq, steal
        ticks = sum(int(row[i]) for row in rows if row[0] in names for i in (1, 2, 3, 6, 7, 8))
        ours = os.times()
        used = ours.user + ours.system + ours.children_user + ours.children_system
        return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), used

    def cores(self) -> float | None:
        """Return how many cores they have used since the start, on average; None where the system does not say."""
        end = self._read()
        if self._begin is None or end is None:
            return None
        wall, busy, ours = (e - b for b, e in zip(self._begin, end, strict=True))
        return max(0.0, busy - ours) / wall


def commit_of_package() -> str | None:
    """Return the commit of the source that runs, "+changes" if the package differs from it; None outside its repository."""

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(PACKAGE), *words], capture_output=True, text=True)

    try:
        if git("ls-files", "--error-unmatch", "__init__.py").returncode:
            return None
        changed = git("diff", "--quiet", "HEAD", "--", ".").returncode
        return git("rev-parse", "--short", "HEAD").stdout.strip() + ("+changes" if changed else "")
    except FileNotFoundError:  # no git
        return None
