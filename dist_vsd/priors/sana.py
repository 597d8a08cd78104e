"""The transformer of SANA (Xie et al. 2024, arXiv 2410.10629): linear attention, and cross-attention to a masked text."""

from __future__ import annotations

from types import MappingProxyType

from torch import Tensor, nn

from dist_vsd.priors.flow_network import SECOND, FlowNetwork
from dist_vsd.priors.networks import dtype_of
from dist_vsd.priors.prior import Text


class SanaNetwork(FlowNetwork):
    """diffusers' SanaTransformer2DModel as a Network: its time is 1000 s times its timestep_scale."""

    adapted = MappingProxyType({"attention": ("to_q", "to_k", "to_v", "to_out.0"), "feedforward": ("conv_inverted", "conv_point")})

    @property
    def time_embedding(self) -> nn.Module:
        """See Network: what both the blocks' modulation and the last layer's are made from."""
        return self.transformer.time_embed.emb

    def velocity(self, x_t: Tensor, t: Tensor, y: Text, guidance_embedding: float) -> Tensor:
        """See FlowNetwork."""
        dtype, time = dtype_of(self.transformer), SECOND * self.transformer.config.timestep_scale * t
        given = {"encoder_hidden_states": y.tokens.to(dtype), "encoder_attention_mask": y.mask}
        return self.transformer(x_t.to(dtype), timestep=time, return_dict=False, **given)[0]
