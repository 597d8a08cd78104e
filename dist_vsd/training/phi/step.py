"""phi's part of an update: AdamW steps on the denoising loss of the particles' renders (Algorithm 1, line 6), over all ranks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dist_vsd.diffusion.process import add_noise
from dist_vsd.objectives.objective import Batch, Noised
from dist_vsd.objectives.vsd import phi_loss
from dist_vsd.score.camera_embedding import POSE_WIDTHS
from dist_vsd.training.draws import Draws, absent_shot
from dist_vsd.training.encoded_renders import EncodedRenders, add_drawn_noise
from dist_vsd.training.phi.trainers import PhiTrainer
from dist_vsd.training.report import Report, Skip
from dist_vsd.training.state import TrainingState
from dist_vsd.training.work import Work


class PhiStep:
    """One AdamW step of phi in the making: passes that leave their gradients in phi, and the step that takes them.

    Each render's loss is divided by the global number of renders before backward, so that the sum over ranks is the mean
    whatever each rank's share. A gradient that is not finite is seen by all ranks after the sum, and all skip the step.

    Args:
        state: of the run.
        phi: with its optimiser.
        num_renders: that the step learns from, over all ranks.
        num_passes: of this rank.
    """

    def __init__(self, state: TrainingState, phi: PhiTrainer, num_renders: int, num_passes: int) -> None:
        self._phi, self._process, self._y = phi, phi.score.process, state.prompt.plain.cond
        self._loss, self._num_renders, self._num_passes, self._num_done = state.config.score.loss, num_renders, num_passes, 0
        self._loss_so_far: Tensor | float = 0.0

    @staticmethod
    def shared_with_theta(state: TrainingState, work: Work) -> PhiStep | None:
        """Return the step of an update in which phi's training passes serve as its score too (--score.reuse-pass); else None.

        Between one particle step and the next phi is the same for both, so that the score is what a pass of its own would give, to
        rounding; only phi's draws are no longer its own.
        """
        if state.phi is None or not state.config.score.reuse_pass:
            return None
        return PhiStep(state, state.phi, work.num_phi_renders, work.passes_for_theta(state.phi))

    def learn_at(self, renders: EncodedRenders, noised: Noised) -> Noised:
        """Make a training pass at theta's own draws; return them with what it predicted, so that the score needs no pass of its own.

        Args:
            renders: of x_0.
            noised: the draws.
        """
        x_t = EncodedRenders.of(renders.shots, noised.x_t, noised.pose, noised.cameras).x_0
        return dataclasses.replace(noised, eps_phi=self.learn(renders, x_t, noised.t, noised.eps, noised.pose))

    def learn(self, renders: EncodedRenders, x_t: Tensor, t: Tensor, eps: Tensor, pose: Tensor) -> Tensor:
        """Make a training pass: add the gradient of the denoising loss to phi's.

        Args:
            renders: B of them; those that weigh nothing leave no gradient.
            x_t: (B, ...) noised.
            t: (B,) times of the process.
            eps: (B, ...) the noise.
            pose: (B, P), as phi is told it here.

        Returns:
            eps_phi at x_t, (B, ...) detached, NaN for a render that was not finite: the pass may serve as the score too.
        """
        y, predicted = self._y.expand(len(x_t)), []

        def loss_of(eps_phi: Callable[..., Tensor]) -> Tensor:
            prediction = eps_phi(x_t, t, y, pose, renders.cameras)
            predicted.append(prediction.detach())
            losses = phi_loss(self._process.error(prediction, renders.x_0, x_t, eps, t, self._loss))
            return (renders.weight * losses).sum() / self._num_renders

        self._num_done += 1
        with torch.enable_grad():
            self._loss_so_far = self._loss_so_far + self._phi.accumulate(loss_of, renders.ids(), self._num_done == self._num_passes)
        eps_phi = self._process.eps(predicted[0], x_t, t)
        return eps_phi * torch.where(renders.weight > 0, 1.0, float("nan")).view(-1, *[1] * (x_t.ndim - 1))

    def take(self, state: TrainingState, work: Work, index: int, report: Report) -> None:
        """Take AdamW's step with what was learned, and report it (collective)."""
        config, loss = state.config.score, torch.as_tensor(self._loss_so_far)
        num_updates = index - state.stage.first + 1
        warmup = 1.0 if state.stage.phi_goes_on else min(1.0, num_updates / max(1, config.num_warmup_updates))
        # This rank's share of the global mean, so that the mean over ranks is it.
        report.figures["phi/loss"].append(loss * state.layout.world_size)
        order = [(particle, number) for particle in sorted(work.chosen.phi) for number in range(state.layout.num_shots)]
        is_bad, scale = self._phi.step(config.lr * warmup, order), self._phi.loss_scale
        report.figures["phi/gradient_norm"].append(self._phi.gradient_norm)

        def tell() -> str:
            cause = "" if math.isfinite(float(loss)) else " (this rank's loss is not finite)"
            scaled = f"; its loss is scaled by {scale.value:g} from now on" if scale.is_used else ""
            return f"phi's gradient is not finite: its step is skipped on all ranks{cause}{scaled}"

        report.skips.append(Skip(is_bad, tell=tell))


def update_phi(
    state: TrainingState, work: Work, batches: list[EncodedRenders], draws: Draws, index: int, step: int, report: Report
) -> None:
    """Take one AdamW step of phi on the renders of the chosen particles of all ranks, at draws of its own (collective).

    Args:
        state: of the run.
        work: of the update.
        batches: this rank's renders, by micro-batch; empty on a rank whose particles are not chosen.
        draws: of the update.
        index: of the update.
        step: of phi within the update.
        report: takes phi's loss (its mean over ranks is the mean denoising loss over all renders), and a skipped step.
    """
    phi, process = state.phi, state.prior.process
    assert phi is not None
    num_passes = work.passes_of_phi(phi, len(batches))
    phi_step = PhiStep(state, phi, work.num_phi_renders, num_passes)
    for number in range(num_passes):  # a rank with fewer batches joins in the others' passes with a weight of zero
        renders = batches[number] if number < len(batches) else absent_render(state)
        t, eps, is_told = draws.for_phi(renders.shots, step)
        x_t = add_noise(renders.x_0, eps, *process.alpha_sigma(t, eps))
        phi_step.learn(renders, x_t, t, eps, renders.pose * is_told[:, None])
    phi_step.take(state, work, index, report)


def join_passes(state: TrainingState, work: Work, shared_pass: PhiStep | None, draws: Draws) -> None:
    """Take part, with a weight of zero, in passes of the other ranks through phi's network, where this rank has fewer micro-batches."""
    phi = state.phi
    assert phi is not None
    if not (phi.same_forwards or shared_pass is not None):
        return
    for _ in range(work.missing_passes(phi)):
        absent = absent_render(state)
        cameras = draws.cameras(absent.shots)
        noised = add_drawn_noise(state, absent.shots, cameras, absent.x_0, draws)
        if shared_pass is not None:
            noised = shared_pass.learn_at(absent, noised)
        state.objective.cotangents(Batch([], cameras, 0.0, [], noised))


def absent_render(state: TrainingState) -> EncodedRenders:
    """Return a shot that weighs nothing; see EncodedRenders.absent."""
    return EncodedRenders.absent(absent_shot(state), state.prior, POSE_WIDTHS[state.config.score.camera])
