"""Peak memory of a rank with 1, 2, 4, ..., 64 particles at once: 3D fields on the embedded prior, two ranks.

    python benchmarks/many_particles.py                                   all; stopped at any time, the same command goes on
    python benchmarks/many_particles.py --sizes 1 2 --num-updates 2 --out /tmp/many      a look at whether it works

Every size is a run of its own by `accelerate launch`, with the preset's defaults. Each finished one is kept in
benchmarks/results/many_particles.json; docs/many_particles.png is drawn from that (with --out, both go there).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from dist_vsd.config_files import DEFAULT_PRESET
from dist_vsd.distributed.layout import Layout
from dist_vsd.scaling.machine import Places, commit_of_package, describe_machine
from dist_vsd.scaling.measure import MIB, Job, Settings, run_job
from dist_vsd.scaling.plots import plot_memory

ROOT = Path(__file__).parent.parent
SIZES = (1, 2, 4, 8, 16, 32, 64)
PROMPT = "a green duck"
STATE_BYTES = 16  # of a number of theta: itself, its gradient and two moments of Adam, fp32


def num_updates_of(size: int) -> int:
    """Return enough updates for the peak; the largest size also shows that it goes on."""
    return 50 if size >= 64 else 10


def measure(size: int, num_ranks: int, num_updates: int, places: Places) -> dict[str, Any]:
    """Run one size and return its row."""
    settings = Settings(prompt=PROMPT, words=("--preset", DEFAULT_PRESET), num_updates=num_updates, num_warmup=min(3, num_updates - 1))
    with tempfile.TemporaryDirectory(prefix="dist_vsd_many_") as folder:
        timing, sizes = run_job(Job(num_ranks, size), settings, places, Path(folder) / "job")
    if timing.peak_memory_mib is None:
        raise SystemExit("the run's metrics.jsonl holds no peak memory: nothing to measure")
    return {
        "num_particles": size,
        "particles_of_a_rank": len(Layout.of(size, num_ranks).particles),
        "num_updates": num_updates,
        "peak_memory_mib": timing.peak_memory_mib,
        "theta_mib": STATE_BYTES * sizes.theta_numbers / MIB,
        "seconds_per_update": timing.seconds_per_update,
        "commit": commit_of_package(),
    }


def kept_record(file: Path, num_ranks: int, machine: str) -> dict[str, Any]:
    """Return the record to go on with: the file's if it is of the same measurement, else an empty one."""
    empty = {"preset": DEFAULT_PRESET, "num_ranks": num_ranks, "machine": machine, "torch": torch.__version__, "sizes": {}}
    if not file.exists():
        return empty
    kept = json.loads(file.read_text())
    other = [name for name in empty if name != "sizes" and kept.get(name) != empty[name]]
    if other:
        raise SystemExit(f"{file} was measured with another {other[0]} ({kept.get(other[0])}): remove it, or choose another --out")
    return kept


def mib_per_particle(rows: list[dict[str, Any]]) -> float | None:
    """Return what one more particle of a rank takes: the slope between the two largest sizes, where activations no longer grow."""
    by_share = sorted(rows, key=lambda row: row["particles_of_a_rank"])[-2:]
    steps = by_share[-1]["particles_of_a_rank"] - by_share[0]["particles_of_a_rank"]
    return (by_share[-1]["peak_memory_mib"] - by_share[0]["peak_memory_mib"]) / steps if steps else None


def show(record: dict[str, Any]) -> None:
    print("particles  of a rank  updates  peak MiB of a rank  theta's state, MiB  s an update")
    rows = sorted(record["sizes"].values(), key=lambda row: row["num_particles"])
    for row in rows:
        state = row["particles_of_a_rank"] * row["theta_mib"]
        print(f"{row['num_particles']:>9}  {row['particles_of_a_rank']:>9}  {row['num_updates']:>7}  {row['peak_memory_mib']:>18.0f}  "
              f"{state:>18.1f}  {row['seconds_per_update']:>11.3f}")  # fmt: skip
    slope = mib_per_particle(rows)
    if slope is not None:
        print(f"one more particle of a rank: {slope:.1f} MiB, of which {rows[-1]['theta_mib']:.1f} are theta's state")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="numbers of particles over all ranks")
    parser.add_argument("--num-updates", type=int, default=0, help="of every size; by default 50 for 64 particles, 10 for fewer")
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for both files")
    arguments = parser.parse_args()
    if min(*arguments.sizes, arguments.num_ranks) < 1 or arguments.num_updates < 0:
        parser.error("sizes and ranks must be at least 1, and updates not negative")
    file = (arguments.out or ROOT / "benchmarks" / "results") / "many_particles.json"
    picture = (arguments.out or ROOT / "docs") / "many_particles.png"
    places = Places.of_this_machine(torch.cuda.device_count())
    record = kept_record(file, arguments.num_ranks, describe_machine(places))
    file.parent.mkdir(parents=True, exist_ok=True)
    for size in arguments.sizes:
        if str(size) in record["sizes"]:
            continue
        num_updates = arguments.num_updates or num_updates_of(size)
        print(f"{size} particle(s), {num_updates} updates ...", flush=True)
        record["sizes"][str(size)] = measure(size, arguments.num_ranks, num_updates, places)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(file)
    show(record)
    plot_memory(record, picture)
    print(f"{file}\n{picture}")


if __name__ == "__main__":
    main()
