"""The transformer of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206)."""

from __future__ import annotations

from torch import Tensor

from dist_vsd.priors.flow_network import SECOND, FlowNetwork
from dist_vsd.priors.networks import dtype_of
from dist_vsd.priors.prior import Text


class StableDiffusion3Network(FlowNetwork):
    """diffusers' SD3Transformer2DModel as a Network: its time is 1000 s, and it reads pooled texts beside their tokens."""

    def velocity(self, x_t: Tensor, t: Tensor, y: Text, guidance_embedding: float) -> Tensor:
        """See FlowNetwork."""
        dtype = dtype_of(self.transformer)
        assert y.pooled is not None, "Stable Diffusion 3 needs pooled embeddings"
        given = {"encoder_hidden_states": y.tokens.to(dtype), "pooled_projections": y.pooled.to(dtype)}
        return self.transformer(x_t.to(dtype), timestep=SECOND * t, return_dict=False, **given)[0]
