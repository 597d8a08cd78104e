"""The first chapters of docs/slurm.md, run line by line on a Slurm of two nodes on this machine: `python -m tests.show_cluster`.

Its jobs are small (--updates), its sweep of four prompts, two seeds and two objectives is preempted once on the way; at the end
it prints where the results page is. It needs root, and installs Slurm if it must.
"""

import argparse
import itertools
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dist_vsd.sweep.manifest import read_sweep
from dist_vsd.sweep.state import states_of
from tests.guide import lines_of
from tests.runs import ROOT
from tests.slurm_cluster import SlurmCluster, why_not
from tests.warm_python import on_path

PROMPTS = ["a green duck", "a red car", "a blue mug", "a yellow house"]


def commands(chapters):
    """Return the lines of some chapters of the guide's page as lists of words."""
    return [line.words for chapter in chapters for line in lines_of(ROOT / "docs" / "slurm.md", chapter)]


class Show:
    """Runs the chapters' lines in a folder.

    Args:
        slurm: a running cluster.
        folder: where it all happens; empty.
        settings: of every run, by dotted name: what makes them small.
        prompts: of the sweep.
        variables: further ones of the environment.
    """

    def __init__(self, slurm, folder, settings, prompts, variables=None):
        self.slurm, self.folder, self.settings, self.prompts = slurm, Path(folder), settings, prompts
        self.variables = slurm.environment | on_path() | {"COLUMNS": "120"} | (variables or {})

    def play(self, chapters):
        """Run all lines of the chapters, of which the last one is on a sweep; return the results page."""
        (self.folder / "slurm").symlink_to(ROOT / "slurm")
        (self.folder / "prompts.txt").write_text("\n".join(self.prompts) + "\n")
        self.jobs = []
        for words in commands(chapters):
            getattr(self, "_" + (words[0] if words[0] == "sbatch" else words[2]))(words)
        return self.folder / "sweeps/prompts/results/results.html"

    def _sbatch(self, words):
        """Submit a run with small settings; the fake nodes have two GPUs."""
        flags = [word for name, value in self.settings.items() for word in (f"--{name}", *str(value).strip("[]").split(","))]
        output = self.run(["sbatch", "--gpus-per-node=2", "--output=%x-%j.log", *words[1:], *flags])
        self.jobs.append(output.split()[-1])

    def _plan(self, words):
        self.run([*words, *itertools.chain(*(("--set", f"{name}={value}") for name, value in self.settings.items()))])

    def _submit(self, words):
        self.run(words)
        if "--local" not in words:
            self._preempt()

    def _preempt(self):
        """Let an urgent job take both nodes as soon as a run of the sweep is under way and the single runs have ended."""
        for job in self.jobs:
            self.slurm.wait(job, "COMPLETED", "FAILED", seconds=1800)
            assert self.slurm.state(job) == "COMPLETED", job
        self._until(lambda states: any(run.state == "running" and run.update > 0 for run in states))
        self.run(["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"])

    def _status(self, words):
        """Show the sweep while it runs, and wait for its end."""
        self.run(words)
        self._until(lambda states: all(run.state in ("done", "failed") for run in states))
        self.run(words)

    def _until(self, condition):
        while not condition(states_of(read_sweep(self.folder / "sweeps/prompts")).values()):
            time.sleep(0.5)

    def _other(self, words):
        self.run(words)

    _collect = _retry = _cancel = _other

    def run(self, words, quietly=False):
        if not quietly:
            print(f"$ {shlex.join(words)}", flush=True)
        done = subprocess.run(words, cwd=self.folder, env=self.variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, f"{shlex.join(words)} ended with {done.returncode}: {done.stdout}"
        if not quietly:
            print(done.stdout, flush=True)
        return done.stdout


def main():
    """Show it all; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=150, help="of every run")
    parser.add_argument("--folder", help="where to work; a new one under the temporary folder by default")
    arguments = parser.parse_args()
    if reason := why_not():
        print(reason)
        return 2
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="dist_vsd_cluster_"))
    folder.mkdir(parents=True, exist_ok=True)
    with SlurmCluster(tempfile.mkdtemp(prefix="slurm_"), networks=True) as cluster:
        page = Show(cluster, folder, {"num_updates": arguments.updates, "checkpoint_every": 50}, PROMPTS).play(["One run", "Many runs"])
    print(f"the page of results: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
