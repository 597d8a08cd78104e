"""One stage of the recipe: AdamW with warm-up and linear decay, an average of the weights, resumable at any step."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_vsd.optimizer import load_optimizer_tensors, optimizer_tensors
from dist_vsd.serialization import read_tensors, write_tensors

LossFunction = Callable[[int, torch.Generator], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSettings:
    """How one network is trained.

    Attributes:
        name: of the stage; its state is ``<name>.safetensors`` in the work folder.
        num_steps: optimiser steps.
        learning_rate: peak of AdamW's rate; it warms up over ``num_warmup_steps`` and then decays linearly to zero.
        ema_decay: of the averaged weights (Polyak), which are the result of the stage.
    """

    name: str
    num_steps: int
    learning_rate: float
    num_warmup_steps: int = 100
    ema_decay: float = 0.999
    weight_decay: float = 1e-3
    max_grad_norm: float = 1.0
    save_every: int = 200


def learning_rate_factor(step: int, num_steps: int, num_warmup_steps: int) -> float:
    """Return the rate's factor at a step, counted from 0: up linearly, then down linearly to zero."""
    return min((step + 1) / num_warmup_steps, (num_steps - step) / max(1, num_steps - num_warmup_steps), 1.0)


def train_stage(
    settings: StageSettings,
    networks: dict[str, nn.Module],
    loss_function: LossFunction,
    folder: Path,
    seed: int,
    device: torch.device,
    report: Callable[[str, int, int, dict[str, float]], None],
) -> dict[str, Tensor]:
    """Train networks jointly, from the newest saved state if there is one.

    Args:
        settings: rates and lengths.
        networks: by name; all their parameters are trained. They are left holding the averaged weights.
        loss_function: from (step, generator) to a scalar loss; every draw must come from the generator, which is keyed
            by (seed, stage, step), so that a resumed run draws what an uninterrupted one would have.
        folder: holds the stage's state.
        seed: of all draws.
        device: of the networks, and of the generator's consumers (the generator itself lives on the CPU).
        report: called with (stage, step, num_steps, figures) now and then.

    Returns:
        The averaged parameters by ``<network>.<parameter>``.
    """
    parameters = {f"{n}.{p}": v for n, network in networks.items() for p, v in network.named_parameters()}
    names = {parameter: name for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{settings.name}.safetensors"
    first_step = _restore(file, parameters, average, optimizer, names) if file.exists() else 0

    running_loss, last_report = None, time.monotonic()
    for step in range(first_step, settings.num_steps):
        for group in optimizer.param_groups:
            factor = learning_rate_factor(step, settings.num_steps, settings.num_warmup_steps)
            group["lr"] = settings.learning_rate * factor
        key = json.dumps([seed, settings.name, step])
        generator = torch.Generator().manual_seed(int.from_bytes(_digest(key), "little"))
        loss = loss_function(step, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
        optimizer.step()
        decay = min(settings.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(parameters.values()), 1 - decay)
        running_loss = loss.detach() if running_loss is None else running_loss.lerp(loss.detach(), 0.05)
        if time.monotonic() - last_report > 5 or step + 1 == settings.num_steps:
            report(settings.name, step + 1, settings.num_steps, {"loss": running_loss.item()})
            last_report = time.monotonic()
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.num_steps:
            _save(file, step + 1, parameters, average, optimizer, names)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(average[name])
    return average


def _digest(key: str) -> bytes:
    import hashlib

    return hashlib.sha256(key.encode()).digest()[:7]


def _save(file: Path, step: int, parameters: dict, average: dict, optimizer: torch.optim.Optimizer, names: dict) -> None:
    tensors = {f"parameter/{k}": v for k, v in parameters.items()} | {f"average/{k}": v for k, v in average.items()}
    tensors |= {f"optimizer/{k}": v for k, v in optimizer_tensors(optimizer, names).items()}
    write_tensors(tensors | {"num_steps_done": torch.tensor(step)}, file)


def _restore(file: Path, parameters: dict, average: dict, optimizer: torch.optim.Optimizer, names: dict) -> int:
    tensors = read_tensors(file)
    with torch.no_grad():
        for name in parameters:
            parameters[name].copy_(tensors[f"parameter/{name}"])
            average[name].copy_(tensors[f"average/{name}"])
    state = {k.removeprefix("optimizer/"): v for k, v in tensors.items() if k.startswith("optimizer/")}
    load_optimizer_tensors(optimizer, names, state)
    return int(tensors["num_steps_done"])  # a stage that ran longer than it is now asked to is used as it is
