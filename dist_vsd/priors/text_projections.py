"""The keys and values of a UNet's attention to the text: they depend on the text alone, so that one computation serves every pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class TextLinear(nn.Linear):
    """A linear layer on the text's tokens that may be told its output.

    Attributes:
        given: (B, num_tokens, out_features) for the pass that is being made, or None.
    """

    given: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Return what was given, or the projection of (B, num_tokens, in_features) tokens."""
        return super().forward(tokens) if self.given is None else self.given


class TextProjections:
    """All layers of a UNet that project the text's tokens: the keys and values of every cross-attention.

    The layers stay where they are, with their weights and names; adapters beside them (score/) add to what they give.

    Args:
        unet: of diffusers; its layers are made TextLinear in place.
    """

    def __init__(self, unet: nn.Module) -> None:
        self._layers: list[TextLinear] = []
        for name, module in unet.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v")) and type(module) is nn.Linear:
                module.__class__ = TextLinear
                self._layers.append(module)

    @torch.no_grad()
    def of(self, tokens: Tensor) -> Tensor:
        """Project (B, num_tokens, width) tokens by all layers; return (B, N), layer after layer."""
        return torch.cat([layer(tokens).flatten(1) for layer in self._layers], 1)

    @contextlib.contextmanager
    def given(self, projected: Tensor) -> Iterator[None]:
        """Let passes inside the ``with`` take (B, N) projections of their texts instead of making them."""
        features = sum(layer.out_features for layer in self._layers)
        num_tokens, first = projected.shape[1] // features, 0
        for layer in self._layers:
            last = first + num_tokens * layer.out_features
            layer.given, first = projected[:, first:last].unflatten(1, (num_tokens, layer.out_features)), last
        try:
            yield
        finally:
            for layer in self._layers:
                layer.given = None
