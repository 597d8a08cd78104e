"""All that a GPU has to show, in one command of less than ten minutes: what is right, what is promised, and what is fast.

    make bench-gpu                              on a machine with an NVIDIA GPU
    python benchmarks/gpu.py --only kernels,updates
    python benchmarks/gpu.py --small            the same in small, on a CPU: whether it runs

Parts, most valuable first: the environment; every Triton kernel against plain torch in fp64 on the CPU; whole updates against the CPU's;
what is promised (--deterministic, resuming to the bit, offloading, fp16 that overflows, each launch configuration, DDP over NCCL); hidden
waits and copies; and speed, beside its targets. Each item has a budget of time. One that fails, does not fit, or is out of time is
recorded with its reason, and the next goes on. benchmarks/results/gpu.json is written after every item. The exit code is 1 if a check
failed or an item broke, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gpu_kernels
import gpu_runs
import gpu_speed
import gpu_updates
import torch
from gpu_items import Item, Place, run_item

from dist_vsd.scaling.machine import Places, commit_of_package, describe_machine

RESULTS = Path(__file__).parent / "results" / "gpu.json"
SECONDS = 570.0  # of all items together
BAD = ("failed", "broke")
PARTS: dict[str, Callable[[Place], Iterable[Item]]] = {
    "environment,kernels": gpu_kernels.items,
    "updates": gpu_updates.items,
    "promises": lambda place: [*gpu_runs.items(place), *gpu_updates.items_of_overflow(place)],
    "waits": gpu_updates.items_of_waits,
    "speed": gpu_speed.items,
}
NAMES = ("environment", "kernels", "updates", "promises", "waits", "speed")


def run_items(items: list[Item], record: dict[str, Any], out: Path, seconds: float) -> None:
    """Run items one after the other, and write the record after each."""
    begin = time.monotonic()
    gc.freeze()  # what was imported: each item ends with a collection
    for item in items:
        record["items"].append(run_item(item, seconds - (time.monotonic() - begin)))
        record["seconds"] = round(time.monotonic() - begin, 1)
        out.write_text(json.dumps(record, indent=1) + "\n")
        show_item(record["items"][-1])
    gc.unfreeze()


def written(value: Any) -> str:
    """Return a figure for a reader."""
    if isinstance(value, dict) and {"value", "target"} <= value.keys():
        return f"{written(value['value'])} (target {written(value['target'])})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show_item(row: dict[str, Any]) -> None:
    """Print an item: a line, and one for each check and figure."""
    reason = f": {row['reason']}" if "reason" in row else ""
    print(f"{row['state']:<9}{row['part']}: {row['name']} ({row['seconds']:.1f} s){reason}", flush=True)
    for check in row.get("checks", []):
        verdict = "ok  " if check["passed"] else "BAD "
        print(f"    {verdict}{check['name']:<58}{written(check['found']):>12}  bound {written(check['bound'])}")
    for name, value in row.get("figures", {}).items():
        print(f"        {name:<58}{written(value):>12}")


def show_summary(record: dict[str, Any]) -> None:
    """Print how many items of each part ended how."""
    states = ("passed", "measured", "failed", "broke", "skipped")
    print("\n" + f"{'part':<14}" + "".join(f"{state:>10}" for state in states))
    for part in dict.fromkeys(row["part"] for row in record["items"]):
        counts = Counter(row["state"] for row in record["items"] if row["part"] == part)
        print(f"{part:<14}" + "".join(f"{counts[state]:>10}" for state in states))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="in small, on a CPU: whether all of it runs; its figures say nothing")
    parser.add_argument("--only", default="", help=f"parts, with commas between: {', '.join(NAMES)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all items together")
    parser.add_argument("--out", type=Path, help="file instead of benchmarks/results/gpu.json; in small a new one")
    parsed = parser.parse_args()
    if not parsed.small and not torch.cuda.is_available():
        print("bench-gpu wants an NVIDIA GPU, and torch finds none here: python benchmarks/gpu.py --small shows on a CPU that it runs")
        return 2
    wanted = parsed.only.split(",") if parsed.only else list(NAMES)
    if unknown := [name for name in wanted if name not in NAMES]:
        print(f"--only must name parts of {', '.join(NAMES)}, got {', '.join(unknown)}: change it")
        return 2
    place = Place(torch.device("cpu" if parsed.small else "cuda"), parsed.small)
    out = parsed.out or (Path(tempfile.mkdtemp()) / "gpu.json" if parsed.small else RESULTS)
    record: dict[str, Any] = {
        "commit": commit_of_package(),
        "machine": describe_machine(Places.of_this_machine(0 if parsed.small else torch.cuda.device_count())),
        "gpu": None if parsed.small else torch.cuda.get_device_name(place.device),
        "torch": torch.__version__,
        "small": parsed.small,
        "seconds": 0.0,
        "items": [],
    }
    items = [item for make in PARTS.values() for item in make(place) if item.part in wanted]
    run_items(items, record, out, parsed.seconds)
    show_summary(record)
    print(f"{record['gpu'] or record['machine']}, commit {record['commit']}, {record['seconds']:.0f} s: {out}")
    return int(any(row["state"] in BAD for row in record["items"]))


if __name__ == "__main__":
    sys.exit(main())
