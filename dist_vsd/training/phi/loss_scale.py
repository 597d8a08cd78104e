"""The factor on phi's loss that keeps fp16 gradients from underflowing, and backs off when they overflow."""

from __future__ import annotations

import torch
from torch import Tensor

# In fp16 the gradient of a mean over 16,384 coordinates falls below the smallest number on its way through the UNet.
FP16_START = 2.0**13
SMALLEST = 1.0
_PREFIX = "loss_scale/"


class LossScale:
    """A loss scale that halves when a step is skipped and doubles, up to its start, after a long run of steps that were taken.

    The loss is multiplied by ``factor`` before backward and the gradients divided by it after. All ranks see the same reduced gradient,
    so that all hold the same scale without a message of its own.

    torch.amp.GradScaler has the same rule but knows neither bound, and DeepSpeed's engine, which takes a number, can't use it: with
    a rule of our own phi is scaled alike under both.

    Args:
        start: the value at the beginning and the greatest; 1: gradients need no scale, and it stays 1.
        num_steps_to_double: steps taken in a row after which it doubles.
        device: of phi, where the scale is kept: nobody waits to know it.
    """

    def __init__(self, start: float, num_steps_to_double: int = 1000, device: torch.device | str = "cpu") -> None:
        self._start, self._num_steps_to_double = start, num_steps_to_double
        self._value = torch.full((), start, device=device)
        self._num_good_steps = torch.zeros((), dtype=torch.int64, device=device)

    @staticmethod
    def of(precision: str, device: torch.device | str = "cpu") -> LossScale:
        """Return the scale for frozen networks of a precision: fp16 alone needs one."""
        return LossScale(FP16_START if precision == "fp16" else 1.0, device=device)

    @property
    def factor(self) -> Tensor | float:
        """What the loss is multiplied by; () on the device, or 1."""
        return self._value if self.is_used else 1.0

    @property
    def value(self) -> float:
        """The same on the host (a CPU-GPU sync)."""
        return float(self._value)

    @property
    def is_used(self) -> bool:
        """Whether gradients are scaled at all."""
        return self._start > 1.0

    def update(self, is_bad: Tensor) -> None:
        """Learn whether the reduced gradient was not finite, so that phi skipped its step; () bool."""
        if not self.is_used:
            return
        is_bad = is_bad.to(self._value.device)
        good_steps = torch.where(is_bad, 0, self._num_good_steps + 1)
        doubles = good_steps == self._num_steps_to_double
        raised = torch.where(doubles, (2 * self._value).clamp(max=self._start), self._value)
        self._value.copy_(torch.where(is_bad, (self._value / 2).clamp(min=SMALLEST), raised))
        self._num_good_steps.copy_(torch.where(doubles, 0, good_steps))

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps, beside AdamW's state; nothing if it is not used."""
        if not self.is_used:
            return {}
        return {f"{_PREFIX}value": self._value.clone(), f"{_PREFIX}num_good_steps": self._num_good_steps.clone()}

    def load(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take what tensors() gave out of a mapping, if it is there, and return the others."""
        if self.is_used and _PREFIX + "value" in tensors:
            self._value.copy_(tensors[_PREFIX + "value"])
            self._num_good_steps.copy_(tensors[_PREFIX + "num_good_steps"])
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(_PREFIX)}
