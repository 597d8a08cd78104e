"""Which shift suits the embedded flow: how far few of Euler's steps end from many, and what CLIP recognises then.

    python benchmarks/flow_shift.py

Every fourth pair of object and colour, guidance 5, from the same noise: 10 and 25 steps at each shift, against 100 at the scheduler's own.
Writes benchmarks/results/flow_shift.json.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from dist_vsd.priors.clip import ClipScorer
from dist_vsd.priors.embedded.captions import all_pairs, caption
from dist_vsd.priors.embedded.recognition import r_precision
from dist_vsd.priors.flow_config import FlowConfig
from dist_vsd.priors.sampling import sample_latents
from dist_vsd.priors.table import load_prior

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "flow_shift.json"
SHIFTS, STEPS, MANY_STEPS, GUIDANCE, FIRST_SEED = (0.7, 1.0, 1.5, 2.0, 3.0), (10, 25), 100, 5.0, 50
PAIRS = all_pairs()[::4]


def draw(shift: float | None, num_steps: int, scorer: ClipScorer) -> tuple[Tensor, float]:
    """Return latents of all PAIRS, and the share of their pictures that are recognised."""
    prior = load_prior("embedded-flow", flow=FlowConfig(shift=shift))
    seeds = range(FIRST_SEED, FIRST_SEED + len(PAIRS))
    x_0 = sample_latents(prior, [caption(*pair) for pair in PAIRS], num_steps, GUIDANCE, seeds)
    with torch.no_grad():
        return x_0, r_precision(scorer, prior.decode(x_0), PAIRS)


def main() -> None:
    scorer = ClipScorer.load()
    reference, _ = draw(None, MANY_STEPS, scorer)
    rows = []
    for shift in SHIFTS:
        for num_steps in STEPS:
            x_0, recognized = draw(shift, num_steps, scorer)
            rms = float((x_0 - reference).square().mean().sqrt())
            rows.append({"shift": shift, "steps": num_steps, "rms": rms, "r_precision": recognized})
            print(f"shift {shift}, {num_steps} steps: {rms:.3f} from {MANY_STEPS} steps, R-precision {recognized:.3f}", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    RESULTS.write_text(json.dumps({"commit": commit, "machine": machine, "guidance": GUIDANCE, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
