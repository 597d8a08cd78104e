"""What an update is made of, counted while it runs: floating-point operations and bytes, by its stages.

The update itself is counted, operation after operation as torch carries them out, not a formula about it; at any size on shapes alone
(scaling/shapes.py).
"""

from __future__ import annotations

import collections
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from dist_vsd.stopwatch import Stopwatch

aten = torch.ops.aten
# torch's own formulas, and those that it lacks: attention on a CPU.
FORMULAS = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class CountedWork(TorchDispatchMode):
    """Inside it, operations of torch are counted.

    A multiplication with its addition is two operations; matrix products, convolutions and attention count, what is elementwise does
    not, as everywhere. Attention's backward pass computes its weights anew where a fused kernel does, which is counted.

    Attributes:
        flop: floating-point operations by stage of the update; "other" outside of them.
        bytes: that operations read and write, by stage: the traffic of an execution that fuses nothing. Views move none.
        num_operations: of torch that were carried out, views and mere allocations excepted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()
        self.num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Carry an operation out and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not _moves_nothing(func):
            stage = Stopwatch.current()
            formula = FORMULAS.get(func._overloadpacket)
            if formula is not None:
                self.flop[stage] += formula(*args, **kwargs, out_val=result)
            tensors = [value for value in tree_flatten((args, kwargs, result))[0] if isinstance(value, Tensor)]
            self.bytes[stage] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.num_operations += 1
        return result


def _moves_nothing(func: Any) -> bool:
    """Say whether an operation's results are views of what it was given, or memory that nothing is written to."""
    if "empty" in func._schema.name:
        return True
    return any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
