"""How much faster an update is on a CPU than at an earlier commit, with equal results: both measured by turns.

    python benchmarks/faster_than.py                          the working tree against the commit that the issue names
    python benchmarks/faster_than.py --pairs 2 --sizes 1 --out /tmp/faster.json      a look at whether it works

A process of each commit is kept, with that commit's own code and preset; they take turns, A B A B, each for a block of as many updates as
lie between two refreshes of the occupancy grids. A ratio is of two neighbouring blocks, so that what else the machine does hits both;
the table has the median of the ratios, and the least and the greatest. Seconds of CPU count, over all threads, and seconds by the clock
are told beside them: on a machine that others use these say little.

Equal results: the versions draw other random numbers, so that no gradient can be compared with another. What is compared is the mean over
all updates of each figure that both report; it should agree within its own spread over updates, a few per cent for 100 of them. That
tells a wrong formula, not a rounding; of that tests/ say that each part is what a derivation of its own or torch's own function gives.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from same_bits import ROOT, checkouts, describe_tree

from dist_vsd.scaling.machine import Places, describe_machine

BLOCK = 16  # updates between two refreshes
NUM_WARMUP = 48  # networks are recorded after 30 passes of one shape
FIGURES = ("theta/score_gradient_norm", "theta/gradient_norm", "phi/loss", "theta/opacity")
# Runs in the commit's own checkout, whose functions have moved between the versions; makes a block whenever it is told to.
DRIVER = '''
import dataclasses, json, sys, time
folder, preset, num_particles, num_threads, figures = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]
sys.path.insert(0, folder)
import torch
import dist_vsd
assert dist_vsd.__file__.startswith(folder), dist_vsd.__file__
try:
    from dist_vsd.config_files import load_preset
except ImportError:
    from dist_vsd.config import load_preset
from dist_vsd.distributed.layout import Layout
from dist_vsd.training.state import build_state
from dist_vsd.training.update import update

torch.set_num_threads(num_threads)
config = dataclasses.replace(load_preset(preset), prompt="a green duck", num_particles=num_particles)
state, index = build_state(config, Layout.of(num_particles), torch.device("cpu")), 0
print("ready", flush=True)
for line in sys.stdin:
    seconds, cpu, told = time.perf_counter(), time.process_time(), {}
    for index in range(index, index + int(line)):
        report = update(state, index)
        report = getattr(report, "figures", report)
        for name in figures:
            values = report[name] if isinstance(report[name], list) else [report[name]]
            told.setdefault(name, []).append(sum(map(float, values)) / len(values))
    index += 1
    result = {"cpu": time.process_time() - cpu, "clock": time.perf_counter() - seconds, "figures": told}
    print(json.dumps(result), flush=True)
'''


class Version:
    """A commit's process.

    Args:
        checkout: its folder.
        driver: file of DRIVER.
        words: preset, particles, threads.
    """

    def __init__(self, checkout: Path, driver: Path, words: list[str]) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": words[2], "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-W", "ignore", str(driver), str(checkout), *words, *FIGURES]
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while (line := self._read()) != "ready":
            print(line)

    def _read(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process ended with {self._process.wait()}")
        return line.strip()

    def block(self, num_updates: int = BLOCK) -> dict[str, Any]:
        """Make some updates; return seconds and figures."""
        self._process.stdin.write(f"{num_updates}\n")
        self._process.stdin.flush()
        return json.loads(self._read())

    def end(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


def measure(before: Path, after: Path, driver: Path, words: list[str], num_pairs: int) -> dict[str, Any]:
    """Measure one size by turns; return its row."""
    versions = [Version(checkout, driver, words) for checkout in (before, after)]
    try:
        warm = [version.block(NUM_WARMUP) for version in versions]
        pairs = [[version.block() for version in versions] for _ in range(num_pairs)]
    finally:
        for version in versions:
            version.end()
    row: dict[str, Any] = {"particles": int(words[1]), "threads": int(words[2]), "pairs": num_pairs, "updates_a_block": BLOCK}
    for clock in ("cpu", "clock"):
        ratios = [one[clock] / other[clock] for one, other in pairs]
        row[f"{clock}_ratio"] = {"median": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}
        row[f"{clock}_seconds_an_update"] = [statistics.median(pair[i][clock] for pair in pairs) / BLOCK for i in (0, 1)]
    blocks = [[warm[i], *(pair[i] for pair in pairs)] for i in (0, 1)]
    for name in FIGURES:
        told = [[value for block in side for value in block["figures"][name]] for side in blocks]
        row.setdefault("figures", {})[name] = compared(*told)
    return row


def compared(before: list[float], after: list[float]) -> dict[str, float]:
    """Return a figure's mean over the updates of both versions, their relative difference, and how far chance alone may take it."""
    means = [statistics.fmean(values) for values in (before, after)]
    variances = [statistics.variance(values) / len(values) for values in (before, after)]
    return {
        "before": means[0],
        "after": means[1],
        "relative_difference": means[1] / means[0] - 1,
        "standard_error": sum(variances) ** 0.5 / abs(means[0]),
    }


def show(row: dict[str, Any]) -> None:
    cpu, clock = row["cpu_ratio"], row["clock_ratio"]
    print(f"{row['particles']} particle(s), {row['threads']} thread(s): {cpu['median']:.2f} times as fast by CPU seconds "
          f"({cpu['least']:.2f} to {cpu['greatest']:.2f}), {clock['median']:.2f} by the clock "
          f"({clock['least']:.2f} to {clock['greatest']:.2f})", flush=True)  # fmt: skip
    for name, one in row["figures"].items():
        print(f"    {name:<28} {one['before']:.4g} and {one['after']:.4g}: {one['relative_difference']:+.1%}, "
              f"standard error {one['standard_error']:.1%}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="f770177", help="commit")
    parser.add_argument("--preset", default="embedded")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 4], help="numbers of particles")
    parser.add_argument("--threads", type=int, default=2, help="of each; 1 on a machine that others use")
    parser.add_argument("--pairs", type=int, default=5, help="of blocks, for each size")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "faster_than.json"))
    asked = parser.parse_args()
    if min(*asked.sizes, asked.threads, asked.pairs) < 1:
        parser.error("sizes, threads and pairs must be at least 1")
    record: dict[str, Any] = {"before": asked.before, "after": describe_tree(), "preset": asked.preset, "torch": torch.__version__}
    record |= {"machine": describe_machine(Places.of_this_machine(0)), "rows": []}
    with tempfile.TemporaryDirectory() as folder, checkouts(asked.before, "", Path(folder)) as (before, after):
        driver = Path(folder) / "driver.py"
        driver.write_text(DRIVER)
        for size in asked.sizes:
            record["rows"].append(measure(before, after, driver, [asked.preset, str(size), str(asked.threads)], asked.pairs))
            show(record["rows"][-1])
            Path(asked.out).write_text(json.dumps(record, indent=1) + "\n")
    print(f"table: {asked.out}")


if __name__ == "__main__":
    main()
