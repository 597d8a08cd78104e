"""theta's part of an update: the backward pass to theta, and Adam's step of a particle, over the ranks that share it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dist_vsd.config import RunConfig
from dist_vsd.distributed.random import keyed_generator
from dist_vsd.objectives.objective import Cotangents
from dist_vsd.optimizer import step_unless
from dist_vsd.particles.owned_particle import THETA, OwnedParticle
from dist_vsd.particles.particle import Render
from dist_vsd.priors.prior import Prior
from dist_vsd.stopwatch import Stopwatch
from dist_vsd.training.report import Report, Skip
from dist_vsd.training.state import TrainingState
from dist_vsd.training.work import MicroBatch


class ThetaStep:
    """The steps of this rank's particles in one update.

    Args:
        state: of the run.
        index: of the update.
        report: takes norms, and particles whose step was skipped.
    """

    def __init__(self, state: TrainingState, index: int, report: Report) -> None:
        self._state, self._index, self._report = state, index, report
        # In the deterministic mode: the gradient of each shot of each particle by itself.
        self._by_shot: dict[tuple[int, int], list[Tensor]] = {}
        # A particle whose sum over the ranks that share it is on its way, and what waits for it.
        self._begun: tuple[OwnedParticle, Callable[[], list[Tensor]]] | None = None

    def backward(self, batch: MicroBatch, cotangents: Cotangents, renders: list[Render], x_0: Tensor | None) -> None:
        """Add the gradient of a micro-batch, the mean over a particle's views, of which other ranks may hold some."""
        config, layout = self._state.config, self._state.layout
        for shot in batch.shots:
            if shot.number == layout.shots[0] or config.deterministic:
                theta = batch.particle_of(shot).theta
                theta.zero_grad(set_to_none=True)
                for statistic in theta.statistics:
                    statistic.zero_()
        roots = list(cotangents.roots)
        # Regularisers are means over a render, of the views of a shot.
        progress = self._state.stage.progress(self._index)
        penalty = sum(len(one.image) * regularization(config, progress, one) for one in renders)
        if config.regularization.reconstruction > 0 and x_0 is not None:
            difference = reconstruction_loss(self._state.prior, renders, x_0, config.supervise)
            penalty = penalty + config.regularization.reconstruction * difference
        if isinstance(penalty, Tensor):
            roots.append((penalty, None))
        # Multiplying by 1 / views before backward: the chain is linear.
        share = 1.0 / layout.num_views
        tensors, gradients = zip(*((root, share * (torch.ones_like(root) if g is None else g)) for root, g in roots), strict=True)
        torch.autograd.backward(tensors, gradients)
        if config.deterministic:
            (shot,) = batch.shots
            self._by_shot[shot.particle, shot.number] = self._sums_of(batch.particle_of(shot))

    @staticmethod
    def _sums_of(particle: OwnedParticle) -> list[Tensor]:
        """Return what the ranks that share a particle add up: its gradients, and the statistics that tell where it grows."""
        return [*particle.gradients, *(statistic.clone() for statistic in particle.theta.statistics)]

    def take(self, particle: OwnedParticle) -> None:
        """Take Adam's step of one particle, or begin it (collective over its view axis).

        Where ranks share the particle, their sum travels beside what the rank does next, and the step follows at the next one's turn or
        at ``finish``; unless the particle itself has to leave the device.
        """
        state, parameters = self._state, particle.parameters
        self.finish()
        if state.config.deterministic:
            order = [(particle.id, number) for number in range(state.layout.num_shots)]
            rows = {row: self._by_shot.pop(row) for row in order if row in self._by_shot}
            total = state.collectives.sum_in_order(rows, order, "views", [*parameters, *particle.theta.statistics])
            self._step(particle, total)
            return
        summed = state.collectives.begin_sum_over_views(self._sums_of(particle))
        if state.layout.view_ranks == 1 or state.config.particles.offload:
            self._step(particle, summed())
            return
        particle.optimizer.zero_grad(set_to_none=True)
        self._begun = particle, summed

    def finish(self) -> None:
        """Take the step that has begun, if there is one."""
        if self._begun is not None:
            (particle, summed), self._begun = self._begun, None
            self._step(particle, summed())

    def _step(self, particle: OwnedParticle, total: list[Tensor]) -> None:
        """Take Adam's step of one particle.

        A gradient that is not finite skips the step: the device decides that by itself, and the loop reads of it when it reads at all.

        Args:
            particle: this rank's.
            total: its gradients and statistics, summed over the ranks that share it.
        """
        state, parameters, statistics = self._state, particle.parameters, particle.theta.statistics
        for statistic in statistics:
            statistic.zero_()  # a rank's own part: left in place, ranks that share the particle would differ by it
        for parameter, gradient in zip(parameters, total, strict=False):
            parameter.grad = gradient
        norm = torch.nn.utils.get_total_norm(total[: len(parameters)])
        is_bad = ~norm.isfinite()
        self._report.figures["theta/gradient_norm"].append(norm)
        self._report.figures["theta/skipped"].append(is_bad.float())
        self._report.skips.append(Skip(is_bad, particle=particle.id))
        decay = learning_rate_factor(state.config, state.stage.progress(self._index))
        start = {group["name"]: group["lr"] for group in particle.theta.parameter_groups()}
        for group in particle.optimizer.param_groups:
            group["lr"] = start[group["name"]] * decay
        step_unless(is_bad, particle.optimizer)
        particle.optimizer.zero_grad(set_to_none=True)  # a fourth of what a particle holds
        if statistics:
            particle.theta.count([torch.where(is_bad, torch.zeros_like(one), one) for one in total[len(parameters) :]])
        if particle.theta.changes_at(self._index - state.stage.first):
            change(state, particle, self._index)


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


def change(state: TrainingState, particle: OwnedParticle, index: int) -> None:
    """Refresh or grow a particle, decided on the first of the ranks that share it and sent to the others (collective over them).

    Decided by each for itself, grids may drift apart: on a GPU entries that are written twice are written in any order.
    """
    is_first = state.layout.view_rank == 0
    if is_first:
        shapes = [parameter.shape for parameter in particle.parameters]
        generator = keyed_generator(state.config.seed, "occupancy", particle=particle.id, update=index)
        particle.theta.after_update(index - state.stage.first, generator, particle.optimizer)
    if state.layout.view_ranks == 1:
        return
    sent = None
    if is_first:
        has_grown = shapes != [parameter.shape for parameter in particle.parameters]
        buffers = {f"{THETA}{name}" for name, _ in particle.theta.named_buffers()}
        sent = {name: tensor for name, tensor in particle.tensors().items() if has_grown or name in buffers}
    received = state.collectives.from_first_view_rank(sent)
    if not is_first:
        own = particle.tensors()
        particle.restore((own if not any("optimizer/" in name for name in received) else {}) | received)


def regularization(config: RunConfig, progress: float, render: Render) -> Tensor | float:
    """Weigh the regularisers that a render has at a progress in [0, 1); 0.0 where there are none or none acts."""
    weights = {name: weight for name, weight in config.regularization.of_renders.items() if weight > 0 and name in render.regularizers}
    if progress < config.regularization.begin_at:
        return 0.0
    return sum((weight * render.regularizers[name]() for name, weight in weights.items()), start=0.0)


def reconstruction_loss(prior: Prior, renders: list[Render], x_0: Tensor, channel: str = "color") -> Tensor:
    """Return the sum over renders of the mean ||image - D(x_0)||^2 over pixels; the gradient flows to the images, not through D or E.

    An encoder sees much less than a picture holds, and the score moves a picture that is free in every pixel, or a network of
    its coordinates, to what only the encoder takes for the prompt. This keeps it near the picture that its latent stands for.

    Args:
        prior: whose decoder D is.
        renders: B of them.
        x_0: (B, ...) them, encoded.
        channel: that was encoded.
    """
    image = torch.cat([render.channel(channel) for render in renders])
    with torch.no_grad():
        decoded = torch.nn.functional.interpolate(prior.decode(x_0).float(), image.shape[-2:], mode="bilinear", antialias=True)
    return (image - decoded).square().flatten(1).mean(1).sum()


def learning_rate_factor(config: RunConfig, progress: float) -> float:
    """Return the factor of theta's learning rates at a progress in [0, 1): 1 until lr_decay_begins, then linearly to final_lr_fraction."""
    decayed = max(0.0, progress - config.lr_decay_begins) / (1.0 - config.lr_decay_begins)
    return 1.0 - (1.0 - config.final_lr_fraction) * decayed
