"""The network of a radiance field: two linear layers with a ReLU between them, asked at very many points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from dist_vsd.kernels import c_kernels
from dist_vsd.kernels.choice import serving


def two_layers(x: Tensor, hidden: nn.Linear, output: nn.Linear) -> Tensor:
    """Return output(relu(hidden(x))); differentiable in x and in both layers, in C once.

    In C the hidden values of a few points at a time are in the cache, and are computed again in the backward pass; plain torch writes
    and reads those of all points, 128 bytes each at a width of 32.

    Args:
        x: (N, E).
        hidden: E to H.
        output: H to O.
    """
    layers = (hidden.weight, hidden.bias, output.weight, output.bias)
    if serving(x, *layers) == "c" and max(*hidden.weight.shape, len(output.weight)) <= c_kernels.MOST_WIDTH:
        return _InC.apply(x, *layers)
    return linear(torch.relu_(linear(x, *layers[:2])), *layers[2:])


class _InC(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        given = tuple(tensor.contiguous() for tensor in given)
        ctx.save_for_backward(*given[:4])
        return c_kernels.two_layers(*given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, ...]:
        return c_kernels.two_layers_backward(*ctx.saved_tensors, cotangent.contiguous())
