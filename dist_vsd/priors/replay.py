"""Replaying a network's operations without its modules: on a CPU these cost a small network more time than its arithmetic.

A pass of the embedded prior's UNet is some 600 operations of a few microseconds each, called from some 900 modules, hooks and
processors of Python, which take as long again. Given shapes and fixed weights they call the same operations every time; so the calls
are recorded once (torch.fx) and written as one flat function. The operations, their order and their numbers stay the same, as does what
autograd makes of them. Nothing is compiled.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

# Recording takes as long as some 50 passes save: who asks a few times only is better off without.
ASKED_BEFORE = 30

aten = torch.ops.aten
# The same operations through torch's own bindings, which find them faster than the dispatcher's Python does.
_BINDINGS: dict[Any, Callable[..., Tensor]] = {
    aten.add.Tensor: torch.add,
    aten.addmm.default: torch.addmm,
    aten.cat.default: torch.cat,
    aten.chunk.default: torch.chunk,
    aten.conv2d.default: torch.conv2d,
    aten.div.Tensor: torch.div,
    aten.expand.default: Tensor.expand,
    aten.flatten.using_ints: torch.flatten,
    aten.gelu.default: torch.nn.functional.gelu,
    aten.group_norm.default: torch.group_norm,
    aten.layer_norm.default: torch.layer_norm,
    aten.linear.default: torch.nn.functional.linear,
    aten.mul.Tensor: torch.mul,
    aten.permute.default: torch.permute,
    aten.reshape.default: torch.reshape,
    aten.scaled_dot_product_attention.default: torch.nn.functional.scaled_dot_product_attention,
    aten.silu.default: torch._C._nn.silu,
    aten.t.default: torch.t,
    aten.transpose.int: torch.transpose,
    aten.unflatten.int: Tensor.unflatten,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.view.default: Tensor.view,
}


class Replayed:
    """A function of tensors, called as it is at first, and replayed where it is asked again and again on a CPU in fp32.

    Args:
        function: of tensors (or None in place of one) to a tensor. It must call the same operations whatever the tensors' numbers, on
            weights that stay where they are and may change their values. Everything that it depends on is an argument.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._num_calls: dict[tuple[Any, ...], int] = {}
        self._recorded: dict[tuple[Any, ...], Callable[..., Tensor]] = {}

    def __call__(self, *tensors: Tensor | None) -> Tensor:
        """Return what the function returns, to the bit, with the same gradients."""
        if not _can_replay(tensors):
            return self._function(*tensors)
        key = tuple(None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
        if key in self._recorded:
            return self._recorded[key](*tensors)
        self._num_calls[key] = self._num_calls.get(key, 0) + 1
        if self._num_calls[key] > ASKED_BEFORE and torch._C._len_torch_dispatch_stack() == 0:
            self._recorded[key] = record(self._function, tensors)
        return self._function(*tensors)

    def forget(self) -> None:
        """Forget what was recorded: the function calls other operations from now on."""
        self._num_calls.clear()
        self._recorded.clear()


def _can_replay(tensors: tuple[Tensor | None, ...]) -> bool:
    given = [tensor for tensor in tensors if tensor is not None]
    plain = all(tensor.device.type == "cpu" and tensor.dtype != torch.float64 for tensor in given)
    return plain and not torch.is_autocast_enabled("cpu")


def record(function: Callable[..., Tensor], tensors: tuple[Tensor | None, ...]) -> Callable[..., Tensor]:
    """Return a flat function that calls the operations which a function calls on tensors of these shapes.

    Args:
        function: see Replayed.
        tensors: on which it is called once.
    """
    given = [i for i, tensor in enumerate(tensors) if tensor is not None]

    def of_given(*values: Tensor) -> Tensor:
        arguments: list[Tensor | None] = [None] * len(tensors)
        for i, value in zip(given, values, strict=True):
            arguments[i] = value
        return function(*arguments)

    with torch.no_grad():
        recorded = make_fx(of_given, pre_dispatch=True)(*(tensors[i] for i in given))
    _simplify(recorded.graph)
    code = recorded.graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, f"<recorded {getattr(function, '__qualname__', function)}>", "exec"), names)
    forward = names["forward"]
    held = [node.target for node in recorded.graph.nodes if node.op == "get_attr"]
    weights = types.SimpleNamespace(**{name: getattr(recorded, name) for name in held})
    return lambda *values: forward(weights, *(values[i] for i in given))


def _simplify(graph: fx.Graph) -> None:
    """Drop calls that return what they are given, and call the others by their fastest name."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if _returns_its_input(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in _BINDINGS:
            node.target = _BINDINGS[node.target]
    graph.eliminate_dead_code()
    graph.lint()


def _returns_its_input(node: fx.Node) -> bool:
    if node.target is aten.dropout.default:
        return not node.args[2]  # not in training
    if node.target is aten.div.Tensor:
        return node.args[1] in (1, 1.0)
    if node.target is aten.to.dtype:
        return len(node.args) == 2 and _dtype_of(node.args[0]) == node.args[1]
    return False


def _dtype_of(node: Any) -> torch.dtype | None:
    known = node.meta.get("val") if isinstance(node, fx.Node) else None
    return known.dtype if isinstance(known, Tensor) else None
