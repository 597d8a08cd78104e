"""Two commits side by side: the same presets, updates, ranks and draws; which particles and which phi are the same to the bit.

    python benchmarks/same_bits.py --before 614940c [--after HEAD] [--out benchmarks/results/same_bits.json]

Every preset runs deterministically on one rank and on two. Version 0.5 draws other random numbers than 0.4 (torch's CPU generator kept 32
bits of a key), so that nothing could be the same. --draws-of-0.4 (the default) gives the later commit 0.4's generators: what is compared
is then everything but the draws. Without it (--own-draws) each commit draws for itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
RUNS = {  # the prompt, the preset, and words that differ between the versions: "before" alone, "after" alone
    "embedded": "a green duck",
    "embedded-sds": "a green duck",
    "embedded-clip": "a green duck",
    "image": "a red car",
    "latent": "a duck",
}
NUM_UPDATES, RANKS = 20, (1, 2)
# Runs in the commit's own checkout: replaces its generators by 0.4's if it is asked to, and is the command line otherwise.
DRIVER = '''
import hashlib, os, sys
sys.path.insert(0, sys.argv.pop(1))
old_draws = sys.argv.pop(1) == "old"
import torch
from dist_vsd.distributed import random as keyed

def of_0_4(seed, purpose, *, particle=0, view=0, shot=0, update=0, step=0):
    key = f"{seed}/{purpose}/{particle}/{view + shot}/{update}/{step}".encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

def lent_0_4(generator, devices):  # what nerfacc's occupancy grid drew from
    torch.manual_seed(generator.initial_seed())

if old_draws:
    keyed.keyed_generator = of_0_4
    if hasattr(keyed, "seed_global"):
        keyed.seed_global = lent_0_4
from dist_vsd.cli import run_process
run_process()
'''


def main() -> None:
    """Run both commits and write which tensors differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="614940c", help="commit of version 0.4.0")
    parser.add_argument("--after", default="", help="commit; empty: the working tree")
    parser.add_argument("--presets", nargs="*", default=list(RUNS))
    parser.add_argument("--ranks", nargs="*", type=int, default=list(RANKS))
    parser.add_argument("--own-draws", action="store_true", help="let the later commit draw its own numbers")
    parser.add_argument("--keep", default="", help="folder for the runs of --before, used again if they are there")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "same_bits.json"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, checkouts(asked.before, asked.after, Path(folder)) as (before, after):
        kept = Path(asked.keep) if asked.keep else Path(folder) / "before"
        rows = []
        for preset in asked.presets:
            for ranks in asked.ranks:
                one = run(before, preset, ranks, kept / f"{preset}-{ranks}", old_draws=False)
                other = run(after, preset, ranks, Path(folder) / "after" / f"{preset}-{ranks}", old_draws=not asked.own_draws)
                rows.append({"preset": preset, "ranks": ranks, **compared(one, other)})
                print(json.dumps(rows[-1]), flush=True)
    commit = asked.after or describe_tree()
    record = {"before": asked.before, "after": commit, "draws": "own" if asked.own_draws else "of 0.4", "updates": NUM_UPDATES}
    record |= {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "rows": rows}
    Path(asked.out).write_text(json.dumps(record, indent=1) + "\n")
    print(f"table: {asked.out}")


class checkouts:  # noqa: N801 - a context manager that reads as one
    """Both commits as folders; the working tree stands for an empty name."""

    def __init__(self, before: str, after: str, folder: Path) -> None:
        self.names, self.folders = (before, after), (folder / "commit_before", folder / "commit_after")

    def __enter__(self) -> tuple[Path, Path]:
        """Make a work tree of each commit that is named."""
        for name, folder in zip(self.names, self.folders, strict=True):
            if name:
                git("worktree", "add", "--quiet", "--detach", str(folder), name)
        return tuple(folder if name else ROOT for name, folder in zip(self.names, self.folders, strict=True))

    def __exit__(self, *_error: object) -> None:
        """Take the work trees away."""
        for name, folder in zip(self.names, self.folders, strict=True):
            if name:
                git("worktree", "remove", "--force", str(folder))


def git(*words: str) -> str:
    """Run git in this repository."""
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def describe_tree() -> str:
    """Return the commit of the working tree, marked where something is not committed."""
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def run(checkout: Path, preset: str, ranks: int, run_dir: Path, old_draws: bool) -> Path:
    """Run a preset with a commit's own code; return the folder of its last checkpoint."""
    last = run_dir / "checkpoints" / f"update_{NUM_UPDATES:08d}"
    if (last / "manifest.json").exists():
        return last
    driver = run_dir.parent / "driver.py"
    driver.parent.mkdir(parents=True, exist_ok=True)
    driver.write_text(DRIVER)
    words = ["train", RUNS[preset], "--preset", preset, "--num-updates", str(NUM_UPDATES), "--num-particles", "2", "--deterministic"]
    words += ["--no-turntables", "--wandb.mode", "disabled", "--run-dir", str(run_dir)]
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "accelerate.commands.launch", "--config_file", str(checkout / "launch_configs" / "cpu.yaml")]
        launch += ["--num_processes", str(ranks), "--main_process_port", "0"]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launch, str(driver), str(checkout), "old" if old_draws else "own", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        told = f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        raise SystemExit(f"{preset} on {ranks} rank(s) in {checkout} ended with {done.returncode}:\n{told}")
    return last


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return theta and phi of a checkpoint by name; the name of phi's network has changed from one version to the next."""
    found = {}
    for file in sorted(checkpoint.rglob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if file.name == "phi.safetensors":
                found[f"phi/{name.rpartition('unet.')[2]}"] = tensor
            elif file.parent.name == "particles" and name.startswith("theta/"):
                found[f"{file.stem}/{name}"] = tensor
    return found


def compared(before: Path, after: Path) -> dict[str, object]:
    """Return how many tensors there are, how many are the same to the bit, and the greatest relative difference of the others."""
    one, other = tensors_of(before), tensors_of(after)
    shared = [name for name in one if name in other]
    different = [name for name in shared if not torch.equal(one[name], other[name])]
    distances = [float((one[n].double() - other[n].double()).norm() / one[n].double().norm().clamp_min(1e-30)) for n in different]
    alone = sorted(set(one) ^ set(other))
    counts = {"tensors": len(one), "same": len(shared) - len(different), "different": len(different), "on one side alone": alone}
    return counts | {"greatest_relative_difference": max(distances, default=0.0), "first_different": different[:3]}


if __name__ == "__main__":
    main()
