"""What a rank does in one update: which particles take part, in which micro-batches, and where they are kept meanwhile."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from dist_vsd.config import RunConfig
from dist_vsd.distributed.layout import Layout, Shot
from dist_vsd.distributed.random import keyed_generator
from dist_vsd.particles.owned_particle import OwnedParticle
from dist_vsd.training.phi.trainers import PhiTrainer
from dist_vsd.training.state import TrainingState


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The particles that take part in one update, the same on all ranks.

    Attributes:
        theta: ids of those that take a step.
        phi: ids of those whose renders phi learns from.
    """

    theta: frozenset[int]
    phi: frozenset[int]


def choose_particles(config: RunConfig, num_particles: int, index: int) -> Chosen:
    """Draw which particles take part in an update; the smaller of the two sets is part of the larger, so that renders serve both."""
    sizes = [size or num_particles for size in (config.particles.theta_batch, config.particles.phi_batch)]
    if min(sizes) == num_particles:
        everyone = frozenset(range(num_particles))
        return Chosen(everyone, everyone)
    order = torch.randperm(num_particles, generator=keyed_generator(config.seed, "chosen_particles", update=index)).tolist()
    return Chosen(*(frozenset(order[:size]) for size in sizes))


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Shots that pass through the frozen networks together.

    Attributes:
        shots: of this rank, particle after particle.
        particles: of them, each once, on the device.
        takes_step: whether their particles take a step in this update; otherwise phi alone learns from them.
        finished: those of the particles that have no later micro-batch in this update.
    """

    shots: list[Shot]
    particles: list[OwnedParticle]
    takes_step: bool
    finished: list[OwnedParticle]

    def particle_of(self, shot: Shot) -> OwnedParticle:
        """Return the particle of one of the shots."""
        return next(particle for particle in self.particles if particle.id == shot.particle)


class Work:
    """One update of this rank.

    Args:
        state: of the run.
        index: of the update.

    Attributes:
        chosen: the particles that take part, on all ranks.
    """

    def __init__(self, state: TrainingState, index: int) -> None:
        self.chosen: Chosen = choose_particles(state.config, state.layout.num_particles, index)
        self._state = state
        self._stepping = _micro_batches(state, self.chosen.theta)
        for_phi = self.chosen.phi - self.chosen.theta
        self._others = _micro_batches(state, for_phi) if state.phi is not None else []

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches, those that take a step first; the next one's particles travel while one is worked on."""
        state, batches = self._state, self._stepping + self._others
        for number, shots in enumerate(batches):
            following = batches[number + 1] if number + 1 < len(batches) else []
            particles = _particles_of(state, shots)
            state.placement.fetch(particles)
            state.placement.prefetch(_particles_of(state, following))
            finished = [particle for particle in particles if not any(shot.particle == particle.id for shot in following)]
            yield MicroBatch(shots, particles, number < len(self._stepping), finished)
            state.placement.release(finished)

    @property
    def stepping(self) -> list[Shot]:
        """This rank's shots of particles that take a step."""
        return [shot for batch in self._stepping for shot in batch]

    @property
    def others(self) -> list[Shot]:
        """This rank's shots from which phi alone learns."""
        return [shot for batch in self._others for shot in batch]

    @property
    def num_phi_renders(self) -> int:
        """Renders that phi learns from in this update, over all ranks."""
        return len(self.chosen.phi) * self._state.layout.num_views

    def passes_of_phi(self, phi: PhiTrainer, num_own: int) -> int:
        """Return how many passes this rank makes in a step of phi: its own, at least one, or as many as the rank that has most."""
        return self._as_on_the_busiest_rank(self.chosen.phi) if phi.same_batches else max(1, num_own)

    def missing_passes(self, phi: PhiTrainer) -> int:
        """Return how many passes for theta's step this rank has fewer than phi's trainer wants of every rank."""
        return self.passes_for_theta(phi) - len(self._stepping)

    def passes_for_theta(self, phi: PhiTrainer) -> int:
        """Return how many passes this rank makes through phi's network for theta's step, those included in which it only joins."""
        return self._as_on_the_busiest_rank(self.chosen.theta) if phi.same_batches else max(1, len(self._stepping))

    def _as_on_the_busiest_rank(self, particles: frozenset[int]) -> int:
        return math.ceil(most_shots_on_a_rank(particles, self._state.layout) / self._state.micro_batch_size)


def most_shots_on_a_rank(particles: frozenset[int], layout: Layout) -> int:
    """Return the shots of some particles on the rank that has most of them."""
    counts = [len(particles.intersection(layout.particles_of_shard(shard))) for shard in range(layout.num_shards)]
    return max(counts) * len(layout.shots)


def _micro_batches(state: TrainingState, chosen: frozenset[int]) -> list[list[Shot]]:
    """Return this rank's shots of some particles, particle after particle, in batches for the frozen networks."""
    ids = [particle.id for particle in state.particles if particle.id in chosen]
    layout = state.layout
    shots = [Shot(particle, number, layout.views_per_shot) for particle in ids for number in layout.shots]
    return [shots[i : i + state.micro_batch_size] for i in range(0, len(shots), state.micro_batch_size)]


def _particles_of(state: TrainingState, shots: list[Shot]) -> list[OwnedParticle]:
    wanted = {shot.particle for shot in shots}
    return [particle for particle in state.particles if particle.id in wanted]
