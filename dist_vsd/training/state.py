"""What a run holds on one rank: its particles with their optimisers, the frozen prior, and phi with its own."""

from __future__ import annotations

import dataclasses

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from dist_vsd.cameras import VIEW_WORDS
from dist_vsd.config import RunConfig
from dist_vsd.distributed.collectives import Collectives
from dist_vsd.distributed.layout import Layout
from dist_vsd.distributed.random import keyed_generator
from dist_vsd.priors.prior import TextEmbeddings
from dist_vsd.priors.stable_diffusion import StableDiffusionPrior
from dist_vsd.score.lora_unet import LoraScore
from dist_vsd.training.owned_particle import OwnedParticle, build_particle
from dist_vsd.training.phi import DataParallelPhi, OrderedPhi, PhiTrainer, PlainPhi
from dist_vsd.training.residence import Offloaded, OnDevice, Residence

# In fp16 the gradient of a mean over 16,384 coordinates falls below the smallest number on its way through the UNet.
FP16_LOSS_SCALE = 2.0**13
DTYPES = {"": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        residence: where the particles are between their turns.
        phi: eps_phi with its optimiser, or None for an objective that needs none.
    """

    config: RunConfig
    layout: Layout
    collectives: Collectives
    prior: StableDiffusionPrior
    prompt: Prompt
    particles: list[OwnedParticle]
    residence: Residence
    phi: PhiTrainer | None


def build_state(config: RunConfig, layout: Layout, device: torch.device, accelerator: Accelerator | None = None) -> TrainingState:
    """Make a run's state at update 0 on this rank (collective).

    Args:
        config: of the run.
        layout: of its particles, as this rank sees it.
        device: of this rank.
        accelerator: of this process; None on one process alone.

    Raises:
        ValueError: the prior can't be used, or it does not know the prompt's words.
    """
    prior = StableDiffusionPrior.load(config.prior, device, DTYPES[config.precision])
    rows = prior.embed([f"{config.prompt}, {words}" for words in VIEW_WORDS] + [config.prompt], config.negative_prompt)
    prompt = Prompt(rows[: len(VIEW_WORDS)], rows[len(VIEW_WORDS) :])
    collectives = Collectives(layout)
    offload = config.particles.offload
    particles = [build_particle(config, particle, torch.device("cpu") if offload else device) for particle in layout.particles]
    residence = Offloaded(particles, device) if offload else OnDevice()
    phi = build_phi(config, prior, collectives, accelerator) if config.objective == "vsd" else None
    return TrainingState(config, layout, collectives, prior, prompt, particles, residence, phi)


def build_phi(
    config: RunConfig, prior: StableDiffusionPrior, collectives: Collectives, accelerator: Accelerator | None
) -> PhiTrainer:
    """Make eps_phi and the trainer that suits the launch: ZeRO, DDP, our own sum in order, or one process."""
    score = LoraScore(prior.unet, prior.schedule, config.score, keyed_generator(config.seed, "initialize_phi"))
    optimizer = torch.optim.AdamW(score.phi().values(), lr=config.score.lr, weight_decay=config.score.weight_decay)
    loss_scale = FP16_LOSS_SCALE if config.precision == "fp16" else 1.0
    if accelerator is not None and accelerator.distributed_type == DistributedType.DEEPSPEED:
        from dist_vsd.training.deepspeed_phi import DeepSpeedPhi

        return DeepSpeedPhi(score, optimizer, collectives, loss_scale, accelerator)
    if config.deterministic:
        return OrderedPhi(score, optimizer, collectives, loss_scale)
    if accelerator is not None and accelerator.num_processes > 1:
        return DataParallelPhi(score, optimizer, collectives, loss_scale, accelerator)
    return PlainPhi(score, optimizer, collectives, loss_scale)


def phi_tensors(state: TrainingState) -> dict[str, Tensor]:
    """Return phi's parameters by name; empty without phi (collective under ZeRO 3)."""
    return state.phi.tensors() if state.phi is not None else {}
