"""LoRA beside a layer in few operations; in bf16 or fp16 its fp32 matrices are cast once a pass and not in each of a UNet's 128 layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor
from torch.nn.functional import conv2d, linear

# Numbers of a weight up to which a call costs more than its arithmetic: 96 x 96 of the embedded prior is below it, 320 x 320 is not.
SMALL = 2**14


class CastOnce(torch.autograd.Function):
    """Casts many small tensors in one go, and their gradients back in another."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors in a dtype."""
        ctx.set_materialize_grads(False)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return tuple(_copies(tensors, [dtype] * len(tensors)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients in the tensors' own dtypes; None for one that was not used."""
        used = [i for i, gradient in enumerate(gradients) if gradient is not None]
        casts = iter(_copies([gradients[i] for i in used], [ctx.dtypes[i] for i in used]))
        return None, *(None if gradient is None else next(casts) for gradient in gradients)


def _copies(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(copies, list(tensors))  # a kernel or two on a GPU, whatever their number
    return copies


class CastLoraLinear(Linear):
    """peft's LoRA layer, which may be told its matrices in the dtype of what it adapts.

    peft's own casts the layer's whole input to fp32, computes there and casts back: four more passes over the activations, kept in
    fp32 for backward. Beside a small fp32 weight the product of the matrices is added to it, which makes two operations of six and, on
    the way back, six of fifteen.

    Attributes:
        matrices: down (rank, in) and up (out, rank) for the pass that is being made, or None: as peft's.
    """

    matrices: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Return base(x) + up down x of (..., in) inputs; the sum is rounded once."""
        if self._disable_adapters or self.matrices is None:
            return super().forward(x, *arguments, **options)
        down, up = self.matrices
        (scale,) = self.scaling.values()
        layer = self.get_base_layer()
        if layer.weight.numel() <= SMALL and layer.weight.dtype == torch.float32:
            return linear(x, torch.addmm(layer.weight, up, down, alpha=scale), layer.bias)
        base = self.base_layer(x)
        return torch.addmm(base.flatten(0, -2), linear(x, down).flatten(0, -2), up.t(), alpha=scale).view(base.shape)


class CastLoraConv2d(Conv2d):
    """Likewise beside a convolution: a convolution to ``rank`` channels, and one of 1 x 1 back from them.

    Attributes:
        matrices: down (rank, in, k, k) and up (out, rank, 1, 1) for the pass that is being made, or None: as peft's.
    """

    matrices: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Return base(x) + up down x of (B, in, H, W) inputs."""
        if self._disable_adapters or self.matrices is None:
            return super().forward(x, *arguments, **options)
        base, (down, up) = self.base_layer, self.matrices
        (scale,) = self.scaling.values()
        return torch.add(base(x), conv2d(conv2d(x, down, None, base.stride, base.padding, base.dilation), up), alpha=scale)
