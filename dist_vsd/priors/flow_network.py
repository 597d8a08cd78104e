"""What the transformers of rectified flows share as networks of a prior."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from dist_vsd.cameras import Cameras
from dist_vsd.diffusion.process import RectifiedFlow
from dist_vsd.priors.prior import Text

SECOND = 1000.0  # what schedulers of diffusers call a whole unit of s


class FlowNetwork(nn.Module, abc.ABC):
    """A transformer of diffusers that predicts the velocity of latents, as a Network (see priors/prior.py).

    Args:
        transformer: of diffusers.
        process: what it predicts.
    """

    adapted: Mapping[str, tuple[str, ...]] = MappingProxyType(
        {
            "attention": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
            "feedforward": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        }
    )
    can_be_replayed, compiled = True, "off"
    # The scale that it is told where nobody says another, of a transformer that was distilled from guidance: none.
    unguided: ClassVar[float] = 1.0

    def __init__(self, transformer: nn.Module, process: RectifiedFlow) -> None:
        super().__init__()
        self.transformer, self.process = transformer, process

    @property
    def time_embedding(self) -> nn.Module:
        """See Network: of time and pooled text, from which every layer's modulation is made."""
        return self.transformer.time_text_embed

    @property
    def time_width(self) -> int:
        """See Network."""
        config = self.transformer.config
        return config.num_attention_heads * config.attention_head_dim

    @property
    def has_guidance_embedding(self) -> bool:
        """Whether it was distilled from guidance, and wants to be told its scale."""
        return bool(self.transformer.config.get("guidance_embeds", False))

    @property
    def patch_size(self) -> int:
        """Latents on a side of a token."""
        return self.transformer.config.patch_size

    def recompute(self, through: Callable[..., Any]) -> None:
        """See Network."""
        self.transformer.enable_gradient_checkpointing(through)

    def forward(
        self, x_t: Tensor, t: Tensor, y: Text, cameras: Cameras | None = None, guidance_embedding: float | None = None
    ) -> Tensor:
        """Predict the velocity eps - x_0 of (B, C, h, w) latents at (B,) times s given B texts; of x_t's dtype.

        Args:
            x_t: noised latents.
            t: s, the share of noise.
            y: texts.
            cameras: ignored, it knows none.
            guidance_embedding: the scale that a transformer distilled from guidance is told; None: 1, no guidance.
        """
        scale = self.unguided if guidance_embedding is None else guidance_embedding
        return self.velocity(x_t, t, y, scale).to(x_t.dtype)  # before any difference is taken of it

    @abc.abstractmethod
    def velocity(self, x_t: Tensor, t: Tensor, y: Text, guidance_embedding: float) -> Tensor:
        """Ask the transformer; see forward(). Each kind has its own."""
