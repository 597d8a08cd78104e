"""Plain sampling of the prior: no distillation, but the reference that every distilled particle is held against."""

from __future__ import annotations

from torch import Tensor

from dist_vsd.objectives.objective_configs import AncestralConfig
from dist_vsd.priors.prior import Prior, TextEmbeddings
from dist_vsd.priors.sampling import sample


def ancestral_sample(prior: Prior, y: TextEmbeddings, noise: Tensor, guidance_scale: float, config: AncestralConfig) -> Tensor:
    """Draw x_0 ~ p(x_0 | y) from noise.

    Args:
        prior: the frozen model.
        y: embeddings of B prompts.
        noise: (B, ...) standard normal.
        guidance_scale: s.
        config: sampler and number of steps.

    Returns:
        Like noise.
    """
    return sample(prior, y, noise, config.num_steps, guidance_scale, config.sampler)
