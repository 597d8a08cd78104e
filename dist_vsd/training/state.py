"""What a run holds on one rank: its particles with their optimisers, the frozen prior, and phi with its own."""

from __future__ import annotations

import dataclasses

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from dist_vsd.config import RunConfig
from dist_vsd.distributed.collectives import Collectives
from dist_vsd.distributed.layout import Layout
from dist_vsd.distributed.random import keyed_generator
from dist_vsd.objectives.objective import Objective
from dist_vsd.particles.owned_particle import OwnedParticle
from dist_vsd.particles.placement import Offloaded, OnDevice, Placement
from dist_vsd.priors.prior import Prior
from dist_vsd.priors.table import load_prior
from dist_vsd.score.lora_score import LoraScore
from dist_vsd.training.phi.loss_scale import LossScale
from dist_vsd.training.phi.trainers import DataParallelPhi, OrderedPhi, PhiTrainer, PlainPhi
from dist_vsd.training.prompt import Prompt, embed_prompt
from dist_vsd.training.stages import Stage

DTYPES = {"": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """Everything that an update reads and changes on one rank.

    Attributes:
        stage: of the run that this state is of.
        layout: who owns what.
        collectives: over that layout.
        prior: the frozen model.
        prompt: embedded.
        particles: this rank's, in the order of their ids.
        placement: where the particles are between their turns.
        phi: eps_phi with its optimiser, or None for an objective that needs none.
        objective: what pulls on the particles.
    """

    stage: Stage
    layout: Layout
    collectives: Collectives
    prior: Prior
    prompt: Prompt
    particles: list[OwnedParticle]
    placement: Placement
    phi: PhiTrainer | None
    objective: Objective

    @property
    def config(self) -> RunConfig:
        """Of the stage: the run's, with what the stage changes."""
        return self.stage.config

    @property
    def micro_batch_size(self) -> int:
        """Shots that pass through the frozen networks together: one in the deterministic mode, whatever the layout."""
        return 1 if self.config.deterministic else max(1, self.config.micro_batch_size // self.layout.views_per_shot)


def build_state(
    run: RunConfig | Stage, layout: Layout, device: torch.device, accelerator: Accelerator | None = None
) -> TrainingState:
    """Make the state of a stage on this rank, its particles as they are drawn by their ids (collective).

    Args:
        run: the stage, or the configuration of a run that has but one.
        layout: of its particles, as this rank sees it.
        device: of this rank.
        accelerator: of this process; None on one process alone.

    Raises:
        ValueError: the prior can't be used, or it does not know the prompt's words.
    """
    stage = run if isinstance(run, Stage) else Stage.whole(run)
    config = stage.config
    prior = load_prior(config.prior, device, DTYPES[config.precision], config.attention, config.compile, config.flow)
    assert prior.views_per_shot == layout.views_per_shot, (prior.views_per_shot, layout.views_per_shot)
    prompt = embed_prompt(config, prior)
    check_shape(config, prior)
    collectives = Collectives(layout)
    offload = config.particles.offload
    particles = [build_particle(config, particle, torch.device("cpu") if offload else device) for particle in layout.particles]
    placement = Offloaded(particles, device) if offload else OnDevice()
    row = config.objective_row
    phi = build_phi(config, prior, collectives, accelerator) if row.needs_phi else None
    objective = row.objective_class()(config, prior, phi.score if phi is not None else None)
    return TrainingState(stage, layout, collectives, prior, prompt, particles, placement, phi, objective)


def build_particle(config: RunConfig, particle: int, device: torch.device) -> OwnedParticle:
    """Make one particle at its start, drawn by its id."""
    row = config.representation_row
    theta = row.particle_class()(row.settings(config), keyed_generator(config.seed, "initialize_theta", particle=particle))
    return OwnedParticle.of(particle, theta.to(device), config.trains)


def check_shape(config: RunConfig, prior: Prior) -> None:
    """Refuse latent particles of another shape than the prior's latents."""
    wanted, given = prior.latent_shape, (config.latent.channels, config.latent.resolution, config.latent.resolution)
    if config.representation_row.is_latent and given != wanted:
        raise ValueError(
            f"the prior's latents have {wanted[0]} channels of {wanted[1]} x {wanted[2]}, got latent.channels {given[0]} and "
            f"latent.resolution {given[1]}: use --latent.channels {wanted[0]} --latent.resolution {wanted[1]}"
        )


def build_phi(config: RunConfig, prior: Prior, collectives: Collectives, accelerator: Accelerator | None) -> PhiTrainer:
    """Make eps_phi and the trainer that suits the launch: ZeRO, DDP, our own sum in order, or one process."""
    network = prior.network_of(config.score.prior) if config.score.prior else prior.network
    score = LoraScore(network, config.score, keyed_generator(config.seed, "initialize_phi"))
    uses_deepspeed = accelerator is not None and accelerator.distributed_type == DistributedType.DEEPSPEED
    rates = {"lr": config.score.lr, "weight_decay": config.score.weight_decay}
    optimizer = torch.optim.AdamW(score.phi().values(), **rates, fused=not uses_deepspeed)  # DeepSpeed skips steps in its own way
    loss_scale = LossScale.of(config.precision, prior.device)
    if accelerator is not None and uses_deepspeed:
        from dist_vsd.training.phi.zero import DeepSpeedPhi

        return DeepSpeedPhi(score, optimizer, collectives, loss_scale, accelerator)
    if config.deterministic:
        return OrderedPhi(score, optimizer, collectives, loss_scale)
    if accelerator is not None and accelerator.num_processes > 1:
        return DataParallelPhi(score, optimizer, collectives, loss_scale, accelerator)
    return PlainPhi(score, optimizer, collectives, loss_scale)


def phi_tensors(state: TrainingState) -> dict[str, Tensor]:
    """Return phi's parameters by name; empty without phi (collective under ZeRO 3)."""
    return state.phi.tensors() if state.phi is not None else {}
