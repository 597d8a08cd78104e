"""Back ends of a UNet's attention: sdpa (torch chooses the kernel), xformers, or torch's flash kernel alone.

The projections stay the UNet's modules, so that phi's LoRA adapts the same ones whatever the back end. A VAE's only attention, of one head
512 wide, which flash kernels don't take, stays with sdpa.
"""

from __future__ import annotations

from collections.abc import Callable

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class AttentionBy:
    """How a transformer block of a UNet attends, in the form that diffusers asks for (an attention processor).

    Args:
        attend: (B, N, H, d) queries, (B, M, H, d) keys and values -> (B, N, H, d), softmax(q k^T / sqrt(d)) v by head.
        num_views: V. Where hidden states attend to themselves, those of V neighbouring rows do so together, with the same weights
            (MVDream, Shi et al. 2023, section 3.1): (B V, N, C) as (B, V N, C).
    """

    def __init__(self, attend: Attend, num_views: int = 1) -> None:
        self.attend, self.num_views = attend, num_views

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Return (B, N, C) of hidden states that attend to themselves, or to others."""
        assert attention_mask is None
        assert hidden_states.ndim == 3
        assert attn.norm_q is None
        assert attn.group_norm is None
        rows = len(hidden_states)
        if encoder_hidden_states is None and self.num_views > 1:
            hidden_states = hidden_states.reshape(rows // self.num_views, -1, hidden_states.shape[2])
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.to_q(hidden_states), attn.to_k(seen), attn.to_v(seen))
        attended = self.attend(*(tensor.unflatten(2, (attn.heads, -1)) for tensor in projected))
        out = attn.to_out[1](attn.to_out[0](attended.flatten(2)))
        return out.reshape(rows, -1, out.shape[2]) if len(out) != rows else out


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by the kernel that torch chooses (see Attend for the shapes)."""
    return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by torch's flash kernel, or not at all: RuntimeError where it can't (see Attend for the shapes)."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(q, k, v)


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by xformers, which chooses among its kernels (see Attend for the shapes, which are its own)."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


ATTEND: dict[str, Attend] = {"sdpa": sdpa, "flash": flash, "xformers": xformers}


def use_attention(unet: UNet2DConditionModel, attention: str, num_views: int = 1) -> None:
    """Let a UNet attend by a back end.

    Args:
        unet: of diffusers; changed in place.
        attention: one of ATTENTIONS; whether it is there is asked before (require_attention).
        num_views: V, of how many neighbouring rows self-attention goes together.
    """
    if attention == "sdpa" and num_views == 1:
        unet.set_attn_processor(AttnProcessor2_0())
    else:
        unet.set_attn_processor(AttentionBy(ATTEND[attention], num_views))
