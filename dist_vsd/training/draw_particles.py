"""Particles that are drawn from the prior instead of being moved: what an objective that ``draws_particles`` makes of an update."""

from __future__ import annotations

import torch

from dist_vsd.distributed.random import keyed_generator
from dist_vsd.training.state import TrainingState
from dist_vsd.training.stopwatch import Stopwatch


@torch.no_grad()
def draw_particles(state: TrainingState, index: int, stopwatch: Stopwatch) -> None:
    """Set every particle of this rank to a sample of the prior, in the first update of a stage; the noise is keyed by the particle."""
    if index > state.stage.first:
        return
    config, prior, size = state.config, state.prior, state.micro_batch_size
    with stopwatch.stage("scores"):
        for batch in (state.particles[i : i + size] for i in range(0, len(state.particles), size)):
            state.placement.fetch(batch)
            generators = [keyed_generator(config.seed, "ancestral", particle=particle.id) for particle in batch]
            noise = torch.stack([torch.randn(prior.latent_shape, generator=generator) for generator in generators]).to(prior.device)
            x_0 = state.objective.sample(state.prompt.plain.expand(len(batch)), noise)
            pictures = x_0 if config.representation_row.is_latent else prior.decode(x_0)
            for particle, picture in zip(batch, pictures, strict=True):
                particle.theta.become(picture)
            state.placement.release(batch)
