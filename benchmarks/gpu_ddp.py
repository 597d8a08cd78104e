"""One rank of a process group, over NCCL on a GPU: two updates with phi under DistributedDataParallel against two without.

Started by `benchmarks/gpu.py` with torchrun's variables or by `accelerate launch`; prints one line of JSON. A run of one rank has no use
for DDP and leaves it out: here it is put in.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket

import torch
import torch.distributed as dist
from gpu_items import configuration, relative_difference, state_of
from torch.nn.parallel import DistributedDataParallel

from dist_vsd.distributed.process import Process, leave_process_group, start_process
from dist_vsd.training.phi.loss_scale import LossScale
from dist_vsd.training.phi.trainers import DataParallelPhi
from dist_vsd.training.state import TrainingState
from dist_vsd.training.update import update

NUM_UPDATES = 2


def be_launched() -> None:
    """Set the variables of a launcher of one rank where there was none: accelerate leaves them out for a single process."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def with_ddp(state: TrainingState, process: Process) -> TrainingState:
    """Return the state with phi under DDP, with an optimiser of its own."""
    config, accelerator = state.config.score, process.accelerator
    assert state.phi is not None

    def prepare(model: torch.nn.Module) -> DistributedDataParallel:  # as accelerate does for several ranks
        assert accelerator.ddp_handler is not None
        return DistributedDataParallel(model, **accelerator.ddp_handler.to_kwargs())

    accelerator.prepare_model = prepare
    optimizer = torch.optim.AdamW(state.phi.score.phi().values(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    phi = DataParallelPhi(state.phi.score, optimizer, state.collectives, LossScale.of(state.config.precision, process.device), accelerator)
    return dataclasses.replace(state, phi=phi)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    config = configuration("latent", {"precision": "fp32"}, parser.parse_args().small)
    be_launched()
    process = start_process("fp32")
    plain, under_ddp = state_of(config, process.device), with_ddp(state_of(config, process.device), process)
    for state in (plain, under_ddp):
        for index in range(NUM_UPDATES):
            update(state, index)
    pairs = {
        "difference of phi": [list(state.phi.tensors().values()) for state in (under_ddp, plain)],
        "difference of theta": [[p for one in state.particles for p in one.parameters] for state in (under_ddp, plain)],
    }
    found = {"backend": dist.get_backend(), "ranks": dist.get_world_size()}
    print(json.dumps(found | {"differences": {name: relative_difference(*pair) for name, pair in pairs.items()}}), flush=True)


if __name__ == "__main__":
    try:
        main()
    finally:
        leave_process_group()
