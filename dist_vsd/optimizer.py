"""Adam: steps that the device may skip by itself, and its state by name."""

from __future__ import annotations

import torch
from torch import Tensor


def step_unless(is_bad: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take a step unless a flag holds, which only the device knows: then parameters, moments and their count stay as they are.

    Nobody waits for the flag: torch's fused Adam takes it as the overflow flag of a gradient scaler.

    Args:
        is_bad: () bool, on the parameters' device.
        optimizer: Adam or AdamW, ``fused``.
    """
    assert all(group["fused"] for group in optimizer.param_groups)
    optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """Flatten an Adam-like optimizer's state to ``<parameter name>/<key>`` tensors.

    Args:
        optimizer: whose states are tensors (``step``, ``exp_avg``, ``exp_avg_sq``).
        names: a name for every optimised parameter.
    """
    return {f"{names[p]}/{key}": torch.as_tensor(value) for p, state in optimizer.state.items() for key, value in state.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor]) -> None:
    """Put tensors from optimizer_tensors back, to the bit; parameters without any keep an empty state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            prefix = names[parameter] + "/"
            saved = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if saved:
                # Adam wants its count on the host unless it is fused.
                places = {"step": parameter.device if group.get("fused") else torch.device("cpu")}
                optimizer.state[parameter] = {
                    key: value.to(places.get(key, parameter.device), torch.float32).clone() for key, value in saved.items()
                }
