"""An update on shapes alone: on the meta device, so that one of any size runs in seconds on any machine, without its memory.

What torch knows of an operation's shapes there is Python, a millisecond for many of them. An update asks the same of equal shapes again
and again, for each tile of a render and each layer of a network, so it is asked once.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config
from torch.optim import adam
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_known: dict[Hashable, Callable[[tuple], Any]] = {}  # how to make again what an operation made of some shapes, while a process lives


@contextlib.contextmanager
def shapes_alone(remembers: bool = True) -> Iterator[None]:
    """Let what runs on the meta device go on where it reads a number: one for a scalar, zeros for a copy, all for nonzero().

    Args:
        remembers: whether what an operation makes of some shapes is asked once; the results are the same without.
    """
    with _ShapesAlone(remembers), fx_config.patch(meta_nonzero_assume_all_nonzero=True), _fused_adam_on_meta():
        yield


class _ShapesAlone(TorchDispatchMode):
    """Answers for the meta device where its numbers are asked for, which it has not."""

    def __init__(self, remembers: bool) -> None:
        super().__init__()
        self._remembers = remembers

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.is_meta:
            if func is aten._local_scalar_dense.default:
                return 1.0 if first.dtype.is_floating_point else 1
            if func is aten.equal.default:
                return True
            if func is aten._to_copy.default and torch.device(kwargs.get("device") or "meta").type == "cpu":
                return torch.zeros(first.shape, dtype=kwargs.get("dtype") or first.dtype)
        return self._remembered(func, args, kwargs)

    def _remembered(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Carry an operation out, or make again what it made of equal shapes."""
        if not self._remembers or not _is_told_by_shapes(func):
            return func(*args, **kwargs)
        try:
            key = func, _described(args), _described(tuple(sorted(kwargs.items())))
            known = _known.get(key)
        except TypeError:  # something among its arguments is no key
            return func(*args, **kwargs)
        if known is not None:
            return known(args)
        result = func(*args, **kwargs)
        again = _how_to_make(result, args)
        if again is not None:
            _known[key] = again
        return result


_told_by_shapes: dict[Any, bool] = {}


def _is_told_by_shapes(func: Any) -> bool:
    """Say whether an operation makes new tensors or writes to its first argument: views are left to torch, which makes them fast."""
    if func not in _told_by_shapes:
        aliases = [out.alias_info for out in func._schema.returns]
        is_new = not func._schema.is_mutable and all(alias is None for alias in aliases)
        writes = len(aliases) == 1 and aliases[0] is not None and aliases[0].is_write and func._schema.name.endswith("_")
        _told_by_shapes[func] = bool(aliases) and (is_new or writes)
    return _told_by_shapes[func]


def _described(value: Any) -> Hashable:
    """Return a key of an argument: of a tensor its shape, strides and dtype, of a number its type, too; TypeError if it has none."""
    if isinstance(value, Tensor):
        if not value.is_meta or type(value) not in (Tensor, nn.Parameter):
            raise TypeError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(map(_described, value))
    return type(value), value


@dataclasses.dataclass(frozen=True)
class _Blank:
    """A new tensor on the meta device."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def __call__(self, _args: tuple) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")


def _how_to_make(result: Any, args: tuple) -> Callable[[tuple], Any] | None:
    """Return what makes such a result again, given the arguments; None where it is more than blank tensors."""
    if args and result is args[0]:
        return lambda given: given[0]
    if isinstance(result, Tensor):
        return _blank_like(result, args)
    if type(result) not in (tuple, list):
        return None
    kind, parts = type(result), [_blank_like(part, args) if isinstance(part, Tensor) else None for part in result]
    return None if None in parts else lambda given: kind(part(given) for part in parts)


def _blank_like(result: Tensor, args: tuple) -> _Blank | None:
    """Return a blank tensor's maker; None where this one shares its memory, as _unsafe_view's does, or is more."""
    blank, storage = _Blank(result.shape, result.stride(), result.dtype), result.untyped_storage()
    is_new = all(storage._cdata != given.untyped_storage()._cdata for given in args if isinstance(given, Tensor))
    is_whole = storage.nbytes() == blank(()).untyped_storage().nbytes()
    return blank if result.is_meta and type(result) is Tensor and is_new and is_whole else None


@contextlib.contextmanager
def _fused_adam_on_meta() -> Iterator[None]:
    """Let fused Adam step there: torch knows the shapes of its kernel, but does not name the device among those that it serves."""
    check = adam._device_dtype_check_for_fused
    adam._device_dtype_check_for_fused = lambda *_arguments, **_options: None
    try:
        yield
    finally:
        adam._device_dtype_check_for_fused = check
