"""One particle of a rank: theta with its Adam."""

from __future__ import annotations

import dataclasses

import torch

from dist_vsd.config import RunConfig
from dist_vsd.distributed.random import keyed_generator
from dist_vsd.particles.image import ImageParticle
from dist_vsd.particles.latent import LatentParticle
from dist_vsd.particles.particle import Particle
from dist_vsd.particles.radiance_field import RadianceField
from dist_vsd.particles.siren import SirenParticle

ADAM_BETAS, ADAM_EPS = (0.9, 0.99), 1e-15  # of theta, as in both public implementations (VSD of hash grids)


@dataclasses.dataclass(frozen=True)
class OwnedParticle:
    """One particle of this rank.

    Attributes:
        id: counted over the whole run.
        theta: the particle.
        optimizer: Adam over theta.
    """

    id: int
    theta: Particle
    optimizer: torch.optim.Optimizer


def build_particle(config: RunConfig, particle: int, device: torch.device) -> OwnedParticle:
    """Make one particle at its start, drawn by its id."""
    generator = keyed_generator(config.seed, "initialize_theta", particle=particle)
    kinds = {
        "radiance_field": (RadianceField, config.field),
        "image": (ImageParticle, config.image),
        "latent": (LatentParticle, config.latent),
        "siren": (SirenParticle, config.siren),
    }
    kind, kind_config = kinds[config.representation]
    theta = kind(kind_config, generator).to(device)
    optimizer = torch.optim.Adam(theta.parameter_groups(), betas=ADAM_BETAS, eps=ADAM_EPS, foreach=True)
    return OwnedParticle(particle, theta, optimizer)
