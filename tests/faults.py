"""Runs the command line with one fault put in, on one rank: `python -m tests.faults FAULT RANK train ...`."""

import os
import signal
import sys
import time

import torch

from dist_vsd.cli import run_process

UPDATE = 5  # at which a fault strikes, counted from 0


def theta_becomes_nan(here):
    """Poison the parameters of this rank's particles, once."""
    from dist_vsd.training import update as module

    def push(state, score, shots, index, *rest, original=module.push_particles):
        if here and index == UPDATE:
            for particle in state.particles:
                with torch.no_grad():
                    next(particle.theta.parameters()).fill_(float("nan"))
        return original(state, score, shots, index, *rest)

    module.push_particles = push


def render_is_nan(here):
    """Spoil the encoded render of one update; theta itself stays finite."""
    from dist_vsd.training import update as module

    def score(*rest, original=module.score_gradient):
        score.calls += 1
        gradient = original(*rest)
        return gradient * float("nan") if here and score.calls == UPDATE + 1 else gradient

    score.calls = 0
    module.score_gradient = score


def phi_loss_is_nan(here):
    """Spoil phi's loss of one update."""
    from dist_vsd.training import phi_step as module

    def loss_of(state, batch, weight, count, index, step, original=module.phi_loss_of):
        return original(state, batch, weight * float("nan") if here and index == UPDATE else weight, count, index, step)

    module.phi_loss_of = loss_of


def no_reduction(_here):
    """Leave out the reduction of phi's gradient, on all ranks: the mistake that public LoRA trainers made."""
    from dist_vsd.training import phi

    def accumulate(self, loss_of, renders, _is_last):
        with self._ddp.no_sync():
            loss = loss_of(self._ddp)
            (loss * self._world_size).backward()
        return loss.detach()

    phi.DataParallelPhi.accumulate = accumulate


def rank_is_slow(here):
    """Sleep in every update."""
    from dist_vsd.training import update as module

    def push(*rest, original=module.push_particles):
        time.sleep(0.2 if here else 0.0)
        return original(*rest)

    module.push_particles = push


def rank_breaks(here):
    """Raise an error that other ranks don't have."""
    from dist_vsd.training import update as module

    def push(state, score, shots, index, *rest, original=module.push_particles):
        if here and index == UPDATE:
            raise RuntimeError("this rank alone\nis broken")
        return original(state, score, shots, index, *rest)

    module.push_particles = push


def stopped_while_wandb_hangs(here):
    """Signal oneself in an update; and give wandb a process that does nothing, and as much time as it likes to finish."""
    from dist_vsd.reporting import wandb_reporter
    from dist_vsd.training import update as module

    def push(state, score, shots, index, *rest, original=module.push_particles):
        if index == UPDATE:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(state, score, shots, index, *rest)

    if here:
        module.push_particles = push
        wandb_reporter.FOLLOWER = ("-c", "import time; time.sleep(1000)")
        wandb_reporter.STOPPED_SECONDS = 1000.0


def killed_inside_a_checkpoint(here):
    """Die by SIGKILL half-way through the second checkpoint, in the first life of the process only."""
    from dist_vsd.runs import checkpoint

    def write(tensors, folder, name, hashes, original=checkpoint._write):
        original(tensors, folder, name, hashes)
        if here and folder.name == ".partial_00000008" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint._write = write


def teardown_aborts(here):
    """Abort when Python takes its modules down, as a thread of a library can."""

    class Abort:
        def __del__(self, abort=os.abort):
            abort()

    if here:
        globals()["_kept_to_the_end"] = Abort()


ALL = (
    theta_becomes_nan, render_is_nan, phi_loss_is_nan, no_reduction, rank_is_slow, rank_breaks,
    stopped_while_wandb_hangs, killed_inside_a_checkpoint, teardown_aborts,
)  # fmt: skip
FAULTS = {fault.__name__: fault for fault in ALL}


if __name__ == "__main__":
    fault, rank, *sys.argv[1:] = sys.argv[1:]
    FAULTS[fault](os.environ.get("RANK", "0") == rank)
    run_process()
