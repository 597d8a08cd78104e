"""One update at Stable Diffusion's real size, on this machine's CPU with random weights: it runs, and takes the memory that was counted.

    python benchmarks/real_size.py                         SD 2.1 at 512 pixels in bf16, some ten minutes and 12 GiB
    python benchmarks/real_size.py --size tiny --render-size 32 --out /tmp/real       a look at whether it works

The count (scaling/counted_memory.py) is of the same update on shapes alone, by the same plain torch that a CPU runs. What is measured is
the most resident memory over what the process had before the networks were built. Results go to benchmarks/results/real_size.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from pathlib import Path

os.environ["DIST_VSD_KERNELS"] = "torch"  # counted as a CPU runs it

import torch

from dist_vsd.config_files import load_preset, merge
from dist_vsd.device import peak_memory_mib, reset_peak_memory
from dist_vsd.distributed.layout import Layout
from dist_vsd.distributed.process import keep_freed_memory
from dist_vsd.scaling.counted_memory import CountedMemory
from dist_vsd.scaling.machine import Places, commit_of_package, describe_machine
from dist_vsd.scaling.shapes import shapes_alone
from dist_vsd.training.state import build_state
from dist_vsd.training.update import update

ROOT = Path(__file__).parent.parent
TILE_POINTS = 2**19  # as where a GPU has little memory
CPU, META = torch.device("cpu"), torch.device("meta")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="sd21")
    parser.add_argument("--render-size", type=int, default=512)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parsed = parser.parse_args()
    settings = {"prompt": "a duck", "prior": f"random:{parsed.size}", "num_particles": 1, "render_size": parsed.render_size}
    settings |= {"precision": parsed.precision, "field": {"tile_points": TILE_POINTS}}
    config = merge(load_preset("stable-diffusion"), settings, "real_size")
    layout = Layout.of(1)
    with shapes_alone(), CountedMemory(META) as counted:
        update(build_state(config, layout, META), 0)
    keep_freed_memory()
    gc.collect()
    reset_peak_memory(CPU)
    before = peak_memory_mib(CPU)
    begin = time.perf_counter()
    state = build_state(config, layout, CPU)
    built = time.perf_counter()
    report = update(state, 0)
    report.stopwatch.stop()
    measured, count = (peak_memory_mib(CPU) - before) * 2**20, counted.peak_bytes
    record = {
        "commit": commit_of_package(),
        "machine": describe_machine(Places.of_this_machine(torch.cuda.device_count())),
        "torch": torch.__version__,
        **vars(parsed) | {"out": ""},
        "counted_gib": count / 2**30,
        "measured_gib": measured / 2**30,
        "measured_over_counted": measured / count,
        "peak_of_the_process_gib": peak_memory_mib(CPU) / 2**10,
        "seconds": {"build": built - begin, **report.stopwatch.seconds()},
        "gradient_norm": report.means()["theta/gradient_norm"],
    }
    print(json.dumps(record, indent=1))
    parsed.out.mkdir(parents=True, exist_ok=True)
    (parsed.out / "real_size.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
