"""Of `benchmarks/gpu.py`: whole updates in this process: against the CPU, fp16 that overflows, hidden waits and copies."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from gpu_items import CPU, Item, Place, Skipped, configuration, relative_difference, state_of, within
from torch import Tensor

from dist_vsd.device import synchronize
from dist_vsd.kernels.choice import has_triton, served_by
from dist_vsd.training.phi.loss_scale import LossScale
from dist_vsd.training.phi.trainers import PlainPhi
from dist_vsd.training.report import read
from dist_vsd.training.state import TrainingState
from dist_vsd.training.update import update

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense grid": ("embedded", {}),
    "hash grid": ("embedded", {"field": {"encoding": "hash"}}),
    "latent": ("latent", {}),
}
# Of gradients, against the CPU's in fp32. The VSD gradient is a small difference of large numbers: what fp32 rounds, 1e-7 a sum, is made
# some 20 times greater, and by more where a gradient nearly vanishes; bf16 is off by a fifth (docs/speed.md), fp16 by an eighth of that.
BOUNDS = {"fp32": 1e-3, "bf16": 0.3, "fp16": 0.05}
SCALE_AT_START = 2.0**25  # at which phi's gradient overflows in fp16; by 2^21 it does no more
MOST_STEPS = 30
WARM = 4  # updates after which allocators and kernels are what they stay
PROFILED = 3


def items(place: Place) -> list[Item]:
    """Return the items: updates against the CPU, most valuable first."""
    halves = [("latent", "bf16"), ("latent", "fp16")]
    halves += [] if place.small else [("dense grid", "bf16"), ("hash grid", "bf16")]
    pairs = [(name, "fp32") for name in VARIANTS] + halves
    return [Item("updates", f"{name}, {precision}", 20, functools.partial(compare, place, name, precision)) for name, precision in pairs]


def items_of_waits(place: Place) -> list[Item]:
    """Return the items about waits."""
    found = []
    for name in ("latent",) if place.small else VARIANTS:
        found.append(Item("waits", f"{name}: updates that may not wait", 15, functools.partial(waits, place, name)))
        found.append(Item("waits", f"{name}: copies", 15, functools.partial(copies, place, name)))
    return found


def items_of_overflow(place: Place) -> list[Item]:
    """Return the item about fp16."""
    return [Item("promises", "fp16 overflows, and phi steps in the end", 20, lambda: overflow(place))]


@contextlib.contextmanager
def in_full_fp32() -> Iterator[None]:
    """Let no matrix product or convolution round its input to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def gradients_taken(state: TrainingState) -> dict[str, list[Tensor]]:
    """Return lists that the gradients of theta and of phi are put into when they take their steps, which frees them."""
    taken: dict[str, list[Tensor]] = {"theta": [], "phi": []}
    assert isinstance(state.phi, PlainPhi)
    optimizers = [("theta", particle.optimizer) for particle in state.particles] + [("phi", state.phi.optimizer)]
    for kind, optimizer in optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def keep(*_: Any, kind: str = kind, parameters: list[Tensor] = parameters) -> None:
            taken[kind] += [parameter.grad.detach().clone() for parameter in parameters]

        optimizer.register_step_pre_hook(keep)
    return taken


def one_update(place: Place, name: str, precision: str, device: torch.device) -> dict[str, list[Tensor]]:
    """Make the first update of a variant; return gradients and parameters of theta and phi."""
    preset, settings = VARIANTS[name]
    state = state_of(configuration(preset, {**settings, "precision": precision}, place.small), device)
    found = {f"gradient of {kind}": gradients for kind, gradients in gradients_taken(state).items()}
    update(state, 0)
    synchronize(device)
    assert state.phi is not None
    found["theta"] = [parameter for particle in state.particles for parameter in particle.parameters]
    return found | {"phi": list(state.phi.tensors().values())}


def compare(place: Place, name: str, precision: str) -> dict[str, Any]:
    """Compare an update on the device with one on the CPU in fp32, by plain torch: its gradients, and what Adam makes of them.

    Adam's first step keeps the sign of every gradient alone, also of those that are nothing but rounding: parameters are figures here.
    """
    with in_full_fp32(), served_by("torch"):
        expected = one_update(place, name, "fp32", CPU)
    # Triton's interpreter needs minutes for a hash grid: in small it serves dense ones alone.
    in_triton = has_triton() and not (place.small and name == "hash grid")
    with in_full_fp32(), served_by("triton" if in_triton else "torch"):
        found = one_update(place, name, precision, place.device)
    differences = {kind: relative_difference(found[kind], expected[kind]) for kind in expected}
    gradients = [within(kind, differences.pop(kind), BOUNDS[precision]) for kind in list(differences) if kind.startswith("gradient")]
    return {"checks": gradients, "figures": {f"difference of {kind}": value for kind, value in differences.items()}}


def overflow(place: Place) -> dict[str, Any]:
    """Begin with a scale of phi's loss at which its gradient overflows: the scale falls, and phi steps in the end."""
    state = state_of(configuration("latent", {"precision": "fp16"}, place.small), place.device)
    assert isinstance(state.phi, PlainPhi)
    state.phi.loss_scale = LossScale(SCALE_AT_START, device=place.device)
    before = {name: tensor.clone() for name, tensor in state.phi.tensors().items()}
    skipped = 0
    for index in range(MOST_STEPS):
        report = update(state, index)
        read([report])
        if not report.events:
            break
        skipped += 1
        moved = any(not torch.equal(before[name], tensor) for name, tensor in state.phi.tensors().items())
        assert not moved, "phi moved in a step that was skipped"
    after = state.phi.tensors()
    differ = sum(not torch.equal(before[name], tensor) for name, tensor in after.items())
    bad = sum(not bool(tensor.isfinite().all()) for tensor in [*after.values(), *(p for one in state.particles for p in one.parameters)])
    checks = [
        within("steps skipped", skipped, MOST_STEPS - 1),
        within("steps not skipped at first (0: it did overflow)", float(skipped == 0), 0),
        within("phi stayed where it was", float(differ == 0), 0),
        within("tensors with numbers that are not finite", bad, 0),
    ]
    return {"checks": checks, "figures": {"scale at the start": SCALE_AT_START, "scale of the first step": state.phi.loss_scale.value}}


@contextlib.contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """Raise where the host waits for the device, as far as torch knows."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def warm_state(place: Place, name: str) -> TrainingState:
    """Return the state of a variant after its first updates."""
    preset, settings = VARIANTS[name]
    state = state_of(configuration(preset, settings, place.small), place.device)
    for index in range(1 if place.small else WARM):
        update(state, index)
    synchronize(place.device)
    return state


def waits(place: Place, name: str) -> dict[str, Any]:
    """Make updates that may not wait, one that refreshes grids among them."""
    state = warm_state(place, name)
    indices = (WARM, state.config.field.occupancy_every)
    with no_waits(place.device):
        for index in indices:
            update(state, index)
    synchronize(place.device)
    if place.device.type != "cuda":
        raise Skipped("a CPU has nobody to wait for: the updates ran")
    return {"checks": [within("waits that torch knows of", 0, 0)], "figures": {"updates": len(indices)}}  # the first would have raised


def copies(place: Place, name: str) -> dict[str, Any]:
    """Count the copies of an update, by torch's profiler."""
    counts = copies_of(warm_state(place, name), WARM)
    if place.device.type != "cuda":
        raise Skipped("a CPU has nobody to wait for: the updates ran, the profiler too")
    # What is drawn travels in one copy, and nothing comes back.
    checks = [within(f"copies {way}, of an update", counts[way], bound) for way, bound in (("HtoD", 1), ("DtoH", 0))]
    return {"checks": checks, "figures": {f"{name}, of an update": counts[name] for name in ("DtoD", "kernels")}}


def copies_of(state: TrainingState, first: int) -> dict[str, float]:
    """Return the number of copies of an update by direction, and of its kernels."""
    device = state.prior.device
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profile:
        for index in range(first, first + PROFILED):
            update(state, index)
        synchronize(device)
    names = [event.name for event in profile.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]
    found = {way: sum(name.startswith(f"Memcpy {way}") for name in names) / PROFILED for way in ("HtoD", "DtoH", "DtoD")}
    return found | {"kernels": sum(not name.startswith(("Memcpy", "Memset")) for name in names) / PROFILED}
