"""What a run holds on one rank: its particles with their optimisers, the frozen prior, and phi with its own."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dist_vsd.cameras import VIEW_WORDS
from dist_vsd.config import RunConfig
from dist_vsd.distributed.collectives import Collectives
from dist_vsd.distributed.layout import Layout
from dist_vsd.distributed.random import keyed_generator
from dist_vsd.particles.image import ImageParticle
from dist_vsd.particles.particle import Particle
from dist_vsd.particles.radiance_field import RadianceField
from dist_vsd.priors.prior import TextEmbeddings
from dist_vsd.priors.stable_diffusion import StableDiffusionPrior
from dist_vsd.score.lora_unet import LoraScore

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


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The run's prompt, embedded once.

    Attributes:
        by_view: y^c, a row for each of VIEW_WORDS.
        plain: y, one row without view words; phi's text.
    """

    by_view: TextEmbeddings
    plain: TextEmbeddings

    def for_views(self, words: list[str]) -> TextEmbeddings:
        """Return y^c for a batch of view words."""
        return self.by_view[[VIEW_WORDS.index(w) for w in words]]


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """Everything that an update reads and changes on one rank.

    Attributes:
        config: of the run.
        layout: who owns what.
        collectives: over that layout.
        prior: the frozen model.
        prompt: embedded.
        particles: this rank's, in the order of their ids.
        score: eps_phi, or None for an objective that needs none.
        phi_optimizer: AdamW over phi, or None.
    """

    config: RunConfig
    layout: Layout
    collectives: Collectives
    prior: StableDiffusionPrior
    prompt: Prompt
    particles: list[OwnedParticle]
    score: LoraScore | None
    phi_optimizer: torch.optim.Optimizer | None


def build_particle(config: RunConfig, particle: int, device: torch.device) -> OwnedParticle:
    """Make one particle at its start, drawn by its id."""
    generator = keyed_generator(config.seed, "initialize_theta", particle=particle)
    kinds = {"radiance_field": (RadianceField, config.field), "image": (ImageParticle, config.image)}
    kind, kind_config = kinds[config.representation]
    theta = kind(kind_config, generator).to(device)
    optimizer = torch.optim.Adam(theta.parameter_groups(), betas=ADAM_BETAS, eps=ADAM_EPS, foreach=True)
    return OwnedParticle(particle, theta, optimizer)


def build_state(config: RunConfig, layout: Layout, device: torch.device) -> TrainingState:
    """Make a run's state at update 0 on this rank.

    Args:
        config: of the run.
        layout: of its particles, as this rank sees it.
        device: of this rank.

    Raises:
        ValueError: the prior can't be used, or it does not know the prompt's words.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    prior = StableDiffusionPrior.load(config.prior, device, dtype)
    rows = prior.embed([f"{config.prompt}, {words}" for words in VIEW_WORDS] + [config.prompt], config.negative_prompt)
    prompt = Prompt(rows[: len(VIEW_WORDS)], rows[len(VIEW_WORDS) :])
    particles = [build_particle(config, particle, device) for particle in layout.particles]
    score = optimizer = None
    if config.objective == "vsd":
        generator = keyed_generator(config.seed, "initialize_phi")
        score = LoraScore(prior.unet, prior.schedule, config.score, generator)
        optimizer = torch.optim.AdamW(score.phi().values(), lr=config.score.lr, weight_decay=config.score.weight_decay)
    return TrainingState(config, layout, Collectives(layout), prior, prompt, particles, score, optimizer)


def phi_tensors(state: TrainingState) -> dict[str, Tensor]:
    """Return phi's parameters by name; empty without phi."""
    return dict(state.score.phi()) if state.score is not None else {}
