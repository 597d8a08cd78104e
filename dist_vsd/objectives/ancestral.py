"""Plain sampling of the prior: no distillation, but the reference that every distilled particle is held against."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from dist_vsd.objectives.objective import Batch, Cotangents, Objective
from dist_vsd.objectives.objective_configs import AncestralConfig
from dist_vsd.priors.prior import Prior, TextEmbeddings
from dist_vsd.priors.sampling import check_sampler, sample

if TYPE_CHECKING:
    from dist_vsd.config import RunConfig
    from dist_vsd.score.score import Score


class Ancestral(Objective):
    """Plain sampling as an objective (see Objective): a particle is drawn whole, in the first update."""

    asks_prior, draws_particles = False, True

    def __init__(self, config: RunConfig, prior: Prior, score: Score | None) -> None:
        self._prior, self._guidance_scale, self._config = prior, config.guidance_scale, config.ancestral
        check_sampler(prior.process, config.ancestral.num_steps, config.ancestral.sampler)

    def cotangents(self, batch: Batch) -> Cotangents:
        """Nothing moves a particle that was drawn."""
        return Cotangents([])

    def sample(self, y: TextEmbeddings, noise: Tensor) -> Tensor:
        """Draw x_0 ~ p(x_0 | y) from (B, ...) noise."""
        return ancestral_sample(self._prior, y, noise, self._guidance_scale, self._config)


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
