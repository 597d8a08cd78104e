"""The README's chapter on the laboratory: denoising, SDS and VSD, with phi exact and learned, three seeds of each.

    python benchmarks/lab.py                                    stopped at any time, the same command goes on
    python benchmarks/lab.py lab_flow                           one of them
    python benchmarks/lab.py --num-updates 50 --out /tmp/lab    a look at whether it works

It is `dist-vsd lab` with the words below: lab compares numbers of phi's steps and both orders on four Gaussians in the plane; lab_mixtures
has full covariances and 16 dimensions; lab_flow has the four Gaussians under a rectified flow. Runs are kept in runs/lab, runs/lab_mixtures
and runs/lab_flow; summaries go to benchmarks/results, pictures of lab and lab_flow to docs/ (with --out, everything stays there).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from dist_vsd.cli import DONE
from dist_vsd.cli import main as dist_vsd

ROOT = Path(__file__).parent.parent
SEEDS = ["--seed", "0", "1", "2"]
COMPARISONS = {
    "lab": ["--phi", "exact", "learned", "--phi-steps", "1", "2", "5", "10", "--order", "theta_then_phi", "phi_then_theta"],
    "lab_mixtures": ["--mixture", "ellipses", "sixteen_dimensions", "--phi", "exact", "learned", "--phi-steps", "1", "5"],
    "lab_flow": ["--process", "rectified_flow", "--shift", "3", "--phi", "exact", "learned", "--phi-steps", "1", "5"],
}
PICTURES = ("lab", "lab_flow")  # of four Gaussians, in docs/


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", nargs="*", metavar="COMPARISON", help=f"of {', '.join(COMPARISONS)}; none: all")
    parser.add_argument("--num-updates", type=int, default=1500)
    parser.add_argument("--out", type=Path, help="folder for everything")
    arguments = parser.parse_args()
    unknown = set(arguments.comparisons) - set(COMPARISONS)
    if unknown:
        parser.error(f"comparison {min(unknown)!r} does not exist: use some of {', '.join(COMPARISONS)}")
    for name, words in COMPARISONS.items():
        if arguments.comparisons and name not in arguments.comparisons:
            continue
        folder = (arguments.out or ROOT / "runs") / name
        code = dist_vsd(["lab", *words, *SEEDS, "--num-updates", str(arguments.num_updates), "--out", str(folder)])
        if code != DONE:
            return code
        if not arguments.out:
            shutil.copyfile(folder / "lab.json", ROOT / "benchmarks" / "results" / f"{name}.json")
            if name in PICTURES:
                shutil.copyfile(folder / "four_gaussians.png", ROOT / "docs" / f"{name}.png")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
