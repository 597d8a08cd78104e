"""How much memory an update holds at most, counted while it runs: every block from its making to its end, by stages.

On the meta device (scaling/shapes.py) this takes seconds on any machine, at any size.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_vsd.config import RunConfig
from dist_vsd.distributed.layout import Layout
from dist_vsd.scaling.cost_model import Peak, most_particles
from dist_vsd.scaling.shapes import shapes_alone
from dist_vsd.stopwatch import Stopwatch
from dist_vsd.training.state import build_state
from dist_vsd.training.update import update

BLOCK_BYTES = 512  # of CUDA's caching allocator: what is asked for is rounded up to it


class CountedMemory(TorchDispatchMode):
    """Inside it, the memory of tensors that are made on a device is counted until it is given back.

    Not counted: what libraries take for themselves (a CUDA context, workspaces of convolutions and matrix products) and what lies idle
    between blocks.

    Args:
        device: whose memory; None: that of all.

    Attributes:
        live_bytes: now.
        peak_bytes: the most so far; ``forget_peak`` begins anew.
        peak_stage: of the update in which that was.
        peaks: the most in each stage.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self._device_type = device.type if device is not None else ""
        self._known: set[int] = set()
        self.live_bytes = 0
        self.forget_peak()

    def forget_peak(self) -> None:
        """Count the most from now on."""
        self.peak_bytes, self.peak_stage, self.peaks = self.live_bytes, "before", {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Carry an operation out and count what it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and self._device_type in ("", tensor.device.type):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        self._known.add(storage._cdata)
        self.live_bytes += size
        weakref.finalize(storage, self._give_back, storage._cdata, size)
        stage = Stopwatch.current()
        self.peaks[stage] = max(self.peaks.get(stage, 0), self.live_bytes)
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_stage = self.live_bytes, stage

    def _give_back(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live_bytes -= size


def count_peak(config: RunConfig, layout: Layout) -> Peak:
    """Count an update of the fullest rank on shapes alone, as a GPU would hold it, with moments in Adam.

    Args:
        config: of the run; of many particles a rank, two are counted, and the others taken to be as the second: as far as a micro-batch
            goes with what it holds on its way through the networks, beyond with what the particle itself holds.
        layout: of the run.
    """
    num_particles = 1 if config.particles.offload else most_particles(layout)
    together = min(num_particles, math.ceil(config.micro_batch_size / len(layout.shots)))
    first = last = count_update(config, layout, 1)
    if together > 1:
        last = count_update(config, layout, 2)
    num_bytes = first.num_bytes + (together - 1) * (last.num_bytes - first.num_bytes)
    if num_particles > together:
        one_by_one = dataclasses.replace(config, micro_batch_size=1)
        own = count_update(one_by_one, layout, 2).num_bytes - count_update(one_by_one, layout, 1).num_bytes
        num_bytes += (num_particles - together) * own
    return Peak(num_bytes, last.stage)


_counted: dict[str, Peak] = {}  # what is asked for again while a process lives: a plan's scales, a run's stages


def count_update(config: RunConfig, layout: Layout, num_particles: int) -> Peak:
    """Count an update of a rank with so many particles, one of those that share each; see ``count_peak``."""
    device = torch.device("meta")
    particles = dataclasses.replace(config.particles, offload=False, theta_batch=0, phi_batch=0)
    few = dataclasses.replace(config, num_particles=num_particles, particles=particles)
    own = Layout.of(num_particles, num_views=layout.num_views // layout.view_ranks, views_per_shot=layout.views_per_shot)
    key = f"{few} {own}"
    if key not in _counted:
        with shapes_alone(), CountedMemory(device) as memory:
            state = build_state(few, own, device)
            for optimizer in [*(particle.optimizer for particle in state.particles), *([state.phi.optimizer] if state.phi else [])]:
                _make_moments(optimizer)
            memory.forget_peak()
            update(state, 1)  # the first one also refreshes grids
        _counted[key] = Peak(memory.peak_bytes, memory.peak_stage)
    return _counted[key]


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Take a step, so that Adam has what it keeps from then on."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

