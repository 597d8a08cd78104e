"""The cost model of `dist-vsd plan` against real training between two hosts whose network is shaped. Linux, as root.

    python benchmarks/validate_plan.py                          unshaped, 1 Gbit/s, 100 Mbit/s, 20 Mbit/s; some minutes when idle
    python benchmarks/validate_plan.py --rates 20 --num-updates 8 --warmup 3        a short look

Two network namespaces joined by a veth pair stand for two hosts. A rank in each, on a core of its own, trains one particle of the
embedded prior; both ends of the pair are shaped by tc's token bucket. The unshaped run gives the seconds of the stages (its row
is what the model is fitted to), a probe by gloo the unshaped link; the shaped rows are foretold from those and the rate alone.
phi fits into one of DDP's buckets (1 MiB), so nothing of its reduction is hidden: overlap 0.
Only the ranks' own processes and the two namespaces are touched, and they are removed at the end, also after Ctrl-C or SIGTERM.
Writes benchmarks/results/plan_validation.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_vsd.distributed.layout import Layout
from dist_vsd.scaling.cost_model import NUMBER_BYTES, Cluster, Link, Sizes, StageSeconds, UpdateCost, ring_all_reduce_seconds, update_cost
from dist_vsd.scaling.machine import OtherPrograms, Places, commit_of_package, describe_machine
from dist_vsd.scaling.measure import Timing, read_metrics, summarize
from dist_vsd.scaling.stage_times import read_measured

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "plan_validation.json"
# Bytes: of TCP in a full Ethernet frame, and what the token bucket counts for it: the frame, and half of the acknowledgement
# that goes out for every second frame of the other direction.
PAYLOAD, COUNTED = 1448, 1514 + 66 / 2
BUCKET_BYTES = 32_000  # full at the start of each reduction: they pass at once
BUSY_CORES, TIMEOUT_SECONDS = 0.1, 1800
TINY_FIELD = ["--field.dense-grid.resolutions", "8", "16", "--field.num-samples", "16", "--field.occupancy-every", "2"]


class Hosts:
    """Two network namespaces joined by a veth pair; rank r lives in the r-th."""

    def __init__(self) -> None:
        self.names = [f"plan{os.getpid()}{end}" for end in "ab"]
        self.interfaces = [f"pv{os.getpid()}{end}" for end in "ab"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def open(self) -> None:
        """Make both, with addresses."""
        for name in self.names:
            command("ip", "netns", "add", name)
            command("ip", "-n", name, "link", "set", "lo", "up")
        (here, there), (one, other) = self.names, self.interfaces
        command("ip", "-n", here, "link", "add", one, "type", "veth", "peer", "name", other, "netns", there)
        for name, interface, address in zip(self.names, self.interfaces, self.addresses, strict=True):
            command("ip", "-n", name, "address", "add", f"{address}/24", "dev", interface)
            command("ip", "-n", name, "link", "set", interface, "up")

    def close(self) -> None:
        """Remove both; the pair goes with its ends."""
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def shape(self, megabits: float) -> None:
        """Limit both directions; 0 for no limit."""
        for name, interface in zip(self.names, self.interfaces, strict=True):
            subprocess.run(["tc", "-n", name, "qdisc", "del", "dev", interface, "root"], capture_output=True, check=False)
            if megabits:
                bucket = ["rate", f"{megabits:g}mbit", "burst", f"{BUCKET_BYTES}b", "latency", "400ms"]
                command("tc", "-n", name, "qdisc", "add", "dev", interface, "root", "tbf", *bucket)

    def sent_bytes(self, rank: int) -> int:
        """Return what a host has sent since the start, with all headers."""
        file = f"/sys/class/net/{self.interfaces[rank]}/statistics/tx_bytes"
        return int(command("ip", "netns", "exec", self.names[rank], "cat", file))

    def start(self, rank: int, core: str, arguments: list[str], log: Any) -> subprocess.Popen:
        """Start a rank as torchrun does, on one core, in a host of its own."""
        ours = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        ours |= {"MASTER_ADDR": self.addresses[0], "MASTER_PORT": 29533, "GLOO_SOCKET_IFNAME": self.interfaces[rank]}
        ours |= {"OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT, "HF_HUB_OFFLINE": 1}
        environment = os.environ | {name: str(value) for name, value in ours.items()}
        within = ["ip", "netns", "exec", self.names[rank], "taskset", "-c", core, sys.executable]
        return subprocess.Popen([*within, *arguments], env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def command(*words: str) -> str:
    """Run a command; return what it printed, or end with what it complained of."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    try:
        hosts.open()
        yield hosts
    finally:
        hosts.close()


@contextlib.contextmanager
def both_ranks(hosts: Hosts, arguments: list[str], log_file: Path) -> Iterator[list[subprocess.Popen]]:
    """Run both ranks; whatever happens, none is left behind."""
    cores = Places.of_this_machine(num_gpus=0).ids[:2]
    processes: list[subprocess.Popen] = []
    with open(log_file, "a") as log:
        try:
            for rank, core in enumerate(cores):
                processes.append(hosts.start(rank, core, arguments, log))
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()


def wait_for(processes: list[subprocess.Popen], log_file: Path) -> bool:
    """Return whether both have ended; ends the program if one failed."""
    codes = [process.poll() for process in processes]
    if any(codes):
        raise SystemExit(f"a rank ended with exit codes {codes}: {log_file.read_text()[-2000:]}")
    return all(code == 0 for code in codes)


def train(hosts: Hosts, folder: Path, asked: argparse.Namespace) -> tuple[list[dict[str, Any]], Timing, float]:
    """Train on both hosts; return the updates after the warm-up, what they took, and the bytes that rank 0 sent in one."""
    arguments = ["-m", "dist_vsd", "train", "a green duck", "--num-particles", "2", "--run-dir", str(folder), *TINY_FIELD]
    arguments += ["--num-updates", str(asked.num_updates), "--score.rank", str(asked.score_rank), "--log-every", "1", "--no-turntables"]
    arguments += ["--check-every", "1000000", "--checkpoint-every", "1000000", "--preview-every", "1000000"]
    metrics, log_file = folder / "metrics.jsonl", folder.with_suffix(".log")
    begun: tuple[int, int] | None = None  # (updates done, bytes sent) after the warm-up
    deadline = time.monotonic() + TIMEOUT_SECONDS
    with both_ranks(hosts, arguments, log_file) as processes:
        while not wait_for(processes, log_file):
            if time.monotonic() > deadline:
                raise SystemExit(f"no end after {TIMEOUT_SECONDS} s: {log_file.read_text()[-2000:]}")
            done = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            if begun is None and done >= asked.warmup:
                begun = done, hosts.sent_bytes(0)
            time.sleep(0.05)
    lines = read_metrics(metrics)
    first, before = begun or (0, 0)
    wire_bytes = (hosts.sent_bytes(0) - before) / max(1, asked.num_updates - first)
    return lines[asked.warmup :], summarize(lines, asked.warmup), wire_bytes


def probe(hosts: Hosts, num_bytes: int, folder: Path) -> Link:
    """Return the link that all-reduces of 4 bytes and of phi's size show; of two ranks, 2 messages and one time its bytes."""
    file, log_file = folder / "probe.json", folder / "probe.log"
    with both_ranks(hosts, [str(Path(__file__).resolve()), "--probe", str(num_bytes), str(file)], log_file) as processes:
        while not wait_for(processes, log_file):
            time.sleep(0.1)
    small, large = json.loads(file.read_text())
    return Link(num_bytes / max(large - small, 1e-9), small / 2)


def probe_rank(num_bytes: int, file: Path) -> None:
    """Time all-reduces as a rank of two; rank 0 writes the medians."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    medians = []
    for numbers, repetitions in ((1, 300), (num_bytes // NUMBER_BYTES, 40)):
        tensor, seconds = torch.zeros(numbers), []
        for _ in range(repetitions):
            begin = time.perf_counter()
            dist.all_reduce(tensor)
            seconds.append(time.perf_counter() - begin)
        medians.append(statistics.median(seconds[repetitions // 10 :]))
    if dist.get_rank() == 0:
        file.write_text(json.dumps(medians))
    dist.destroy_process_group()


def foretold(stages: StageSeconds, sizes: Sizes, between: Link) -> UpdateCost:
    """Return what the model says of two particles on two hosts."""
    return update_cost(Layout.of(2, 2), Cluster(2, 1, between, between), stages, sizes)


def validate(hosts: Hosts, folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Run unshaped and at each rate; return the record."""
    rows, stages, sizes, unshaped = [], None, None, None
    for rate in [0.0, *(rate for rate in asked.rates if rate)]:
        hosts.shape(rate)
        others = OtherPrograms()
        run_folder = folder / f"{rate:g}_mbit"
        lines, timing, wire_bytes = train(hosts, run_folder, asked)
        if stages is None:
            sizes = read_measured(run_folder, 1.0).sizes
            unshaped = probe(hosts, NUMBER_BYTES * sizes.phi_numbers, folder)
            other = timing.seconds_per_update - sum(timing.stages.values())
            reduction = ring_all_reduce_seconds(NUMBER_BYTES * sizes.phi_numbers, 2, unshaped)
            compute = timing.stages | {"phi": max(0.0, timing.stages["phi"] - reduction)}
            stages = StageSeconds(**compute, other=other)
        limited = min(unshaped.bandwidth, rate * 1e6 / 8 * PAYLOAD / COUNTED) if rate else unshaped.bandwidth
        cost = foretold(stages, sizes, Link(limited, unshaped.latency))
        bucket = BUCKET_BYTES * 8e-6 / rate if rate else 0.0
        seconds = sorted(line["seconds/update"] for line in lines)
        measured, predicted = timing.seconds_per_update, cost.seconds - cost.agreement - bucket  # logged without the flag to stop
        row = {"rate_mbit": rate or None, "is_fitted": not rate, "measured_seconds": measured, "predicted_seconds": predicted}
        row |= {"relative_error": predicted / measured - 1, "measured_range": [seconds[0], seconds[-1]], "num_updates": len(seconds)}
        row |= {"predicted_payload_bytes": cost.rank_sent_bytes, "wire_bytes": wire_bytes, "cores_used_by_other_programs": others.cores()}
        rows.append(row)
        print(line_of(row), flush=True)
    return {
        "commit": commit_of_package(),
        "machine": describe_machine(Places.of_this_machine(num_gpus=0)),
        "torch": importlib.metadata.version("torch"),
        "settings": {"num_updates": asked.num_updates, "warmup": asked.warmup, "score_rank": asked.score_rank},
        "phi_numbers": sizes.phi_numbers,
        "stage_seconds": vars(stages),
        "unshaped_link": {"bandwidth_bytes_per_second": unshaped.bandwidth, "latency_seconds": unshaped.latency},
        "rows": rows,
    }


HEADER = f"{'rate':>12}  {'measured s':>10}  {'predicted s':>11}  {'error':>7}  {'payload bytes':>13}  {'wire bytes':>11}   of one update"


def line_of(row: dict[str, Any]) -> str:
    rate = f"{row['rate_mbit']:g} Mbit/s" if row["rate_mbit"] else "unshaped"
    others = row["cores_used_by_other_programs"] or 0.0
    busy = f"   other programs used {others:.1f} cores: measure on a quiet machine" if others > BUSY_CORES else ""
    error = "fitted" if row["is_fitted"] else f"{100 * row['relative_error']:+.1f} %"
    seconds = f"{row['measured_seconds']:10.4f}  {row['predicted_seconds']:11.4f}"
    return f"{rate:>12}  {seconds}  {error:>7}  {row['predicted_payload_bytes']:13,.0f}  {row['wire_bytes']:11,.0f}{busy}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="*", default=[1000.0, 100.0, 20.0], help="Mbit/s; the unshaped run is always made")
    parser.add_argument("--num-updates", type=int, default=30, help="of each run")
    parser.add_argument("--warmup", type=int, default=5, help="first updates that are left out")
    parser.add_argument("--score-rank", type=int, default=24, help="of LoRA: 24 makes phi 0.98 MB")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON")
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.probe:
        probe_rank(int(asked.probe[0]), Path(asked.probe[1]))
        return 0
    if asked.num_updates < asked.warmup + 3 or asked.warmup < 1 or any(rate < 0 for rate in asked.rates):
        return refuse("--warmup must be 1 or more, --num-updates at least 3 more, and --rates 0 or more")
    missing = [tool for tool in ("ip", "tc", "taskset") if shutil.which(tool) is None]
    if os.geteuid() or missing or len(Places.of_this_machine(num_gpus=0).ids) < 2:
        return refuse("this needs root, two cores, ip and tc (iproute2) and taskset (util-linux), to make and shape network namespaces")
    with tempfile.TemporaryDirectory() as folder, two_hosts() as hosts:
        print(HEADER)
        record = validate(hosts, Path(folder), asked)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {asked.out}")
    return 0


def refuse(message: str) -> int:
    print(f"validate_plan: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
