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

    The loss is multiplied by ``value`` before backward and the gradients divided by it after. All ranks see the same reduced gradient,
    so that all hold the same scale without a message of its own.

    torch.amp.GradScaler has the same rule but knows neither bound, and DeepSpeed's engine, which takes a number, can't use it: with
    a rule of our own phi is scaled alike under both.

    Args:
        start: the value at the beginning and the greatest; 1: gradients need no scale, and it stays 1.
        num_steps_to_double: steps taken in a row after which it doubles.
    """

    def __init__(self, start: float, num_steps_to_double: int = 1000) -> None:
        self.value, self._start, self._num_steps_to_double = start, start, num_steps_to_double
        self._num_good_steps = 0

    @staticmethod
    def of(precision: str) -> LossScale:
        """Return the scale for frozen networks of a precision: fp16 alone needs one."""
        return LossScale(FP16_START if precision == "fp16" else 1.0)

    @property
    def is_used(self) -> bool:
        """Whether gradients are scaled at all."""
        return self._start > 1.0

    def update(self, took_step: bool) -> None:
        """Learn whether the reduced gradient was finite, so that phi took its step."""
        self._num_good_steps = self._num_good_steps + 1 if took_step else 0
        if not took_step:
            self.value = max(SMALLEST, self.value / 2)
        elif self._num_good_steps == self._num_steps_to_double:
            self.value, self._num_good_steps = min(self._start, 2 * self.value), 0

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps, beside AdamW's state; nothing if it is not used."""
        if not self.is_used:
            return {}
        values = {"value": torch.tensor(self.value), "num_good_steps": torch.tensor(self._num_good_steps)}
        return {_PREFIX + name: tensor for name, tensor in values.items()}

    def load(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take what tensors() gave out of a mapping, if it is there, and return the others."""
        if self.is_used and _PREFIX + "value" in tensors:
            self.value = float(tensors[_PREFIX + "value"])
            self._num_good_steps = int(tensors[_PREFIX + "num_good_steps"])
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(_PREFIX)}
