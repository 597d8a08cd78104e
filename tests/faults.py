"""Runs the command line with one fault put in, on one rank: `python -m tests.faults FAULT RANK train ...`."""

import dataclasses
import os
import signal
import sys
import time

import torch

from dist_vsd.cli import run_process

UPDATE = 5  # at which a fault strikes, counted from 0


def at_update(action):
    """Call ``action(state, index)`` before each update."""
    from dist_vsd.training import loop as module

    def update(state, index, measure, original=module.update):
        action(state, index)
        return original(state, index, measure)

    module.update = update


def theta_becomes_nan(here):
    """Poison the parameters of this rank's particles, once."""

    def poison(state, index):
        for particle in state.particles if here and index == UPDATE else []:
            with torch.no_grad():
                next(particle.theta.parameters()).fill_(float("nan"))

    at_update(poison)


def render_is_nan(here):
    """Spoil the gradient of one update; theta itself stays finite."""
    from dist_vsd.objectives import vsd as module

    def gradient(*rest, original=module.vsd_gradient):
        gradient.calls += 1
        return original(*rest) * (float("nan") if here and gradient.calls == UPDATE + 1 else 1.0)

    gradient.calls = 0
    module.vsd_gradient = gradient


def phi_loss_is_nan(here):
    """Spoil phi's loss of one update."""
    from dist_vsd.training import update as module

    def spoilt(state, work, batches, draws, index, *rest, original=module.update_phi):
        if here and index == UPDATE:
            batches = [dataclasses.replace(batch, weight=batch.weight * float("nan")) for batch in batches]
        return original(state, work, batches, draws, index, *rest)

    module.update_phi = spoilt


def theta_drifts(here):
    """Change a particle on this rank by a hair, once, as a sum in another order would."""

    def drift(state, index):
        for particle in state.particles if here and index == UPDATE else []:
            with torch.no_grad():
                next(particle.theta.parameters()).mul_(1.0001)

    at_update(drift)


def memory_ends(here):
    """Ask for more memory than there is, once: the allocator itself refuses."""

    def ask(state, index):
        if here and index == UPDATE:
            torch.ones(2**46)

    at_update(ask)


def grid_is_refreshed_otherwise(here):
    """Refresh the occupancy grid otherwise on this rank, as a GPU may that writes an entry twice."""
    from dist_vsd.particles.radiance_field import RadianceField

    def after_update(self, *rest, original=RadianceField.after_update):
        original(self, *rest)
        if here:
            self.occupancy.binaries[..., 0] = True
            self.occupancy.occs[0] += 1.0

    RadianceField.after_update = after_update


def phi_overflows(here):
    """Let phi's loss of one rank pass through fp16, amplified, in a run that scales its loss as in fp16; every rank tells its scale."""
    from dist_vsd.training.phi import step
    from dist_vsd.training.phi.loss_scale import FP16_START, LossScale

    def loss(*arguments, original=step.phi_loss):
        # Of two renders on two ranks, the gradient in fp16 is 200 times the scale: above 65,504 it overflows.
        plain = original(*arguments)
        return 200 * (plain / 200).half().float() if here else plain

    def update(self, is_bad, original=LossScale.update):
        original(self, is_bad)
        print(f"rank {os.environ.get('RANK', '0')}: step {not is_bad}, scale {self.value:g}", flush=True)

    step.phi_loss = loss
    LossScale.of = staticmethod(lambda _precision, _device: LossScale(FP16_START))
    LossScale.update = update


def no_reduction(_here):
    """Leave out the reduction of phi's gradient, on all ranks: the mistake that public LoRA trainers made."""
    from dist_vsd.training.phi import trainers

    def accumulate(self, loss_of, renders, _is_last):
        with self._ddp.no_sync():
            loss = loss_of(self._ddp)
            (loss * self._world_size).backward()
        return loss.detach()

    trainers.DataParallelPhi.accumulate = accumulate


def fp16_passes_on_a_cpu(_here):
    """Don't refuse fp16 for want of a GPU: torch can do it on a CPU, if slowly."""
    from dist_vsd.distributed import process

    def resolve(precision, _on_cpu, original=process.resolve_precision):
        return original(precision, False)

    process.resolve_precision = resolve


def torch_is_older(here):
    """Have an older torch installed on this rank."""
    import importlib.metadata

    def version(package, original=importlib.metadata.version):
        return "2.6.1" if here and package == "torch" else original(package)

    importlib.metadata.version = version


def deepspeed_is_missing(here):
    """Be told to use DeepSpeed, which this rank alone does not have."""
    import importlib.util

    def find_spec(name, *rest, original=importlib.util.find_spec):
        if name != "deepspeed":
            return original(name, *rest)
        return None if here else original("json")

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    importlib.util.find_spec = find_spec


def tells_how_it_started(_here):
    """Join the other ranks, print what this process was made, and end."""
    from dist_vsd.distributed.process import start_process

    process = start_process()
    settings = process.accelerator.deepspeed_plugin.deepspeed_config
    kind, clipping, bf16 = process.accelerator.distributed_type.value, settings["gradient_clipping"], settings["bf16"]
    print(process.zero_stage, process.precision, kind, clipping, bf16, flush=True)
    os._exit(0)


def rank_is_slow(here):
    """Sleep in every update."""
    at_update(lambda _state, _index: time.sleep(0.2 if here else 0.0))


def rank_breaks(here):
    """Raise an error that other ranks don't have."""

    def fail(_state, index):
        if here and index == UPDATE:
            raise RuntimeError("this rank alone\nis broken")

    at_update(fail)


def stopped_while_wandb_hangs(here):
    """Signal oneself in an update; and give wandb a process that does nothing, and as much time as it likes to finish."""
    from dist_vsd.reporting import wandb_reporter

    if here:
        at_update(lambda _state, index: os.kill(os.getpid(), signal.SIGUSR1) if index == UPDATE else None)
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
    theta_becomes_nan, render_is_nan, phi_loss_is_nan, phi_overflows, theta_drifts, grid_is_refreshed_otherwise, no_reduction,
    fp16_passes_on_a_cpu, torch_is_older, deepspeed_is_missing, tells_how_it_started, rank_is_slow, rank_breaks, stopped_while_wandb_hangs,
    killed_inside_a_checkpoint, teardown_aborts, memory_ends,
)  # fmt: skip
FAULTS = {fault.__name__: fault for fault in ALL}


if __name__ == "__main__":
    fault, rank, *sys.argv[1:] = sys.argv[1:]
    FAULTS[fault](os.environ.get("RANK", "0") == rank)
    run_process()
