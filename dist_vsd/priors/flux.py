"""The transformer of FLUX: latents packed two by two, rotary positions, and a guidance embedding where it was distilled from guidance."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from dist_vsd.priors.flow_network import FlowNetwork
from dist_vsd.priors.networks import dtype_of
from dist_vsd.priors.prior import Text

PACKED = 2  # latents on a side of a token


class FluxNetwork(FlowNetwork):
    """diffusers' FluxTransformer2DModel as a Network: its time is s, which it multiplies by 1000 itself."""

    adapted = MappingProxyType({**FlowNetwork.adapted, "feedforward": (*FlowNetwork.adapted["feedforward"], "proj_mlp")})

    @property
    def patch_size(self) -> int:
        """See FlowNetwork."""
        return PACKED

    def velocity(self, x_t: Tensor, t: Tensor, y: Text, guidance_embedding: float) -> Tensor:
        """See FlowNetwork."""
        dtype, (height, width) = dtype_of(self.transformer), x_t.shape[-2:]
        assert y.pooled is not None, "FLUX needs pooled embeddings"
        guidance = torch.full_like(t, guidance_embedding, dtype=torch.float32) if self.has_guidance_embedding else None
        predicted = self.transformer(
            packed(x_t).to(dtype),
            encoder_hidden_states=y.tokens.to(dtype),
            pooled_projections=y.pooled.to(dtype),
            timestep=t,
            img_ids=places(height // PACKED, width // PACKED, x_t.device),
            txt_ids=torch.zeros(y.tokens.shape[1], 3, device=x_t.device),
            guidance=guidance,
            return_dict=False,
        )[0]
        return unpacked(predicted, height, width)


def packed(x: Tensor) -> Tensor:
    """Return (B, C, h, w) latents as tokens of 2 x 2, (B, h w / 4, 4 C), row by row; channels come before places in a token."""
    tiles = x.unflatten(2, (-1, PACKED)).unflatten(4, (-1, PACKED))
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens as (B, C, height, width) latents: what packed() takes."""
    tiles = tokens.unflatten(1, (height // PACKED, width // PACKED)).unflatten(3, (-1, PACKED, PACKED))
    return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def places(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return where each token of a picture is, (rows columns, 3): 0, its row and its column."""
    row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1).float()
