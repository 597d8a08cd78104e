"""What is computed of tensors once, as long as they stay as they are."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class Derived(Generic[Value]):
    """What was computed of some tensors, while they are as they were: the same ones, and not written to since.

    They are kept with it, so that no others take their place in memory. Not for what a fused optimizer steps: that leaves a tensor's
    version as it was.
    """

    def __init__(self, tensors: tuple[Tensor, ...], value: Value) -> None:
        self._tensors, self._versions, self.value = tensors, [tensor._version for tensor in tensors], value

    def is_outdated(self, *tensors: Tensor) -> bool:
        """Say whether these tensors are others, or were written to."""
        known = zip(self._tensors, self._versions, tensors, strict=True)
        return any(old is not new or version != new._version for old, version, new in known)
