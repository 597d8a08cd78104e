"""phi's part of an update: AdamW steps on the denoising loss of the particles' renders (Algorithm 1, line 6), over all ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dist_vsd.diffusion.process import Process, add_noise
from dist_vsd.objectives.vsd import phi_loss
from dist_vsd.priors.prior import Text
from dist_vsd.training.draws import Chosen, Shot, draw_kept_poses, draw_noise, draw_phi_t
from dist_vsd.training.phi import PhiTrainer
from dist_vsd.training.renders import Renders, absent_render
from dist_vsd.training.report import Report
from dist_vsd.training.state import TrainingState


def update_phi(
    state: TrainingState, phi: PhiTrainer, batches: list[Renders], chosen: Chosen, index: int, step: int, report: Report
) -> None:
    """Take one AdamW step of phi on the renders of the chosen particles of all ranks (collective).

    Each render's loss is divided by the global number of renders before backward, so that the sum over ranks is the mean
    whatever each rank's share. A gradient that is not finite is seen by all ranks after the sum, and all skip the step.

    Args:
        state: of the run.
        phi: with its optimiser.
        batches: this rank's renders, by micro-batch; empty on a rank whose particles are not chosen.
        chosen: which particles phi learns from.
        index: of the update.
        step: of phi within the update.
        report: takes phi's loss (its mean over ranks is the mean denoising loss over all renders), and a skipped step.
    """
    count = len(chosen.phi) * state.layout.num_views
    num_batches = number_of_passes(state, phi, len(batches), chosen.most_on_a_rank(chosen.phi, state.layout))
    total: Tensor | float = 0.0
    for number in range(num_batches):
        is_padding = number >= len(batches)  # a rank with fewer batches joins in the others' passes with a weight of zero
        batch = absent_render(state) if is_padding else batches[number]
        loss_of = phi_loss_of(state, batch, batch.weight, count, index, step)
        total = total + phi.accumulate(loss_of, batch.ids(), number == num_batches - 1)
    take_step(state, phi, total, chosen, index, report)


def number_of_passes(state: TrainingState, phi: PhiTrainer, num_own: int, most_renders: int) -> int:
    """Return how many micro-batches this rank runs: its own, at least one, or as many as the rank that has most."""
    return math.ceil(most_renders / state.micro_batch_size) if phi.same_batches else max(1, num_own)


def take_step(state: TrainingState, phi: PhiTrainer, total: Tensor | float, chosen: Chosen, index: int, report: Report) -> None:
    """Take AdamW's step with what was accumulated, and report it (collective)."""
    config = state.config
    warmup = min(1.0, (index + 1) / max(1, config.score.num_warmup_updates))
    # This rank's share of the global mean, so that the mean over ranks is it.
    report.figures["phi/loss"].append(float(total) * state.layout.world_size)  # CPU-GPU sync
    order = [(particle, view) for particle in sorted(chosen.phi) for view in range(state.layout.num_views)]
    took_step = phi.step(config.score.lr * warmup, order)
    report.figures["phi/gradient_norm"].append(phi.gradient_norm)
    if not took_step:
        cause = "" if math.isfinite(float(total)) else " (this rank's loss is not finite)"
        report.events.append(f"phi's gradient is not finite: its step is skipped on all ranks{cause}")


def phi_loss_of(
    state: TrainingState, batch: Renders, weight: Tensor, count: int, index: int, step: int
) -> Callable[[Callable[..., Tensor]], Tensor]:
    """Return the summed, weighted denoising loss of a micro-batch / global count, as a function of eps_phi."""
    config, prior, x_0 = state.config, state.prior, batch.x_0
    t = draw_phi_t(config, batch.shots, index, step, prior.process).to(x_0.device)
    eps = draw_noise(config, "phi_noise", batch.shots, index, x_0, step)
    pose = batch.pose * draw_kept_poses(config, batch.shots, index, step).to(x_0.device)[:, None]
    x_t = add_noise(x_0, eps, *prior.process.alpha_sigma(t, x_0))
    process = state.phi.score.process
    y = state.prompt.plain.cond.expand(len(x_t))

    def loss_of(eps_phi: Callable[..., Tensor]) -> Tensor:
        losses = phi_loss(process.error(eps_phi(x_t, t, y, pose), x_0, x_t, eps, t, config.score.loss))
        return (weight * losses).sum() / count

    return loss_of


@dataclasses.dataclass
class ReusedPass:
    """phi's training pass at the particles' own t and noise: what it predicts serves as the score too (a Score).

    Between one particle step and the next phi is the same for both, so that the score is what a pass of its own would give, to
    rounding; only phi's draws are no longer its own.

    Attributes:
        state: of the run.
        phi: with its optimiser.
        count: renders of the update over all ranks.
        num_passes: of this rank in the update.
        total: loss so far, this rank's share of the global mean.
        num_done: passes so far.
        shots, x_0, eps, weight: of the next pass; the weight is 0 where this rank only joins in the others' passes.
    """

    state: TrainingState
    phi: PhiTrainer
    count: int
    num_passes: int
    total: Tensor | float = 0.0
    num_done: int = 0
    shots: list[Shot] = dataclasses.field(default_factory=list)
    x_0: Tensor | None = None
    eps: Tensor | None = None
    weight: float = 1.0

    @property
    def process(self) -> Process:
        """See Score."""
        return self.phi.score.process

    def pretrained(self) -> contextlib.AbstractContextManager[None]:
        """See Score."""
        return self.phi.score.pretrained()

    def __call__(self, x_t: Tensor, t: Tensor, y: Text, pose: Tensor) -> Tensor:
        """Return what phi predicts of x_t, detached, and accumulate the gradient of its denoising loss."""
        assert self.x_0 is not None
        assert self.eps is not None
        eps, config = self.eps, self.state.config
        batch, x_0 = Renders.of(self.shots, x_t, pose), Renders.of(self.shots, self.x_0, pose).x_0
        taken: list[Tensor] = []

        def loss_of(eps_phi: Callable[..., Tensor]) -> Tensor:
            prediction = eps_phi(batch.x_0, t, y, pose)
            taken.append(prediction.detach())
            losses = phi_loss(self.process.error(prediction, x_0, batch.x_0, eps, t, config.score.loss))
            return (self.weight * batch.weight * losses).sum() / self.count

        self.num_done += 1
        with torch.enable_grad():
            self.total = self.total + self.phi.accumulate(loss_of, batch.ids(), self.num_done == self.num_passes)
        # A render that is not finite keeps its NaN in theta's gradient, where it is noticed.
        return taken[0] * torch.where(batch.weight > 0, 1.0, float("nan")).view(-1, *[1] * (x_t.ndim - 1))
