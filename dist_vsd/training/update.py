"""ONE update of all particles and of phi, in the order of ProlificDreamer's Algorithm 1. Read this file first.

    y^c = embed(prompt, c)        image = render(theta, c)        x_0 = encode(image)        x_t = add_noise(x_0, eps, t)
    gradient = vsd(eps_pretrain, eps_phi, w_t)                    theta <- Adam(backward(x_0, gradient))
    loss_phi = denoising loss of eps_phi on x_0, detached         phi's gradients summed over ranks / global count
    phi <- AdamW

Algorithm 1 steps one particle and then phi; here every particle takes its step, and phi then learns from the renders of
all of them, on all ranks, as one batch. Each random draw is keyed by (seed, particle, view, update, purpose).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from dist_vsd.diffusion.schedule import add_noise
from dist_vsd.diffusion.timesteps import timestep_weight
from dist_vsd.distributed.random import keyed_generator
from dist_vsd.objectives.sds import sds_gradient
from dist_vsd.objectives.vsd import phi_loss, vsd_gradient
from dist_vsd.priors.prior import Prior, TextEmbeddings, eps_pretrain
from dist_vsd.score.score import Score
from dist_vsd.training.draws import Shot, draw_cameras, draw_kept_poses, draw_noise, draw_phi_t, draw_t, key, words_of
from dist_vsd.training.owned_particle import OwnedParticle
from dist_vsd.training.phi import PhiTrainer
from dist_vsd.training.state import TrainingState
from dist_vsd.training.stopwatch import Stopwatch

# Colours settle last: rates that fall from the start leave a duck without its orange beak.
DECAY_BEGINS = 0.6


@dataclasses.dataclass(frozen=True)
class Renders:
    """Encoded renders of one update on this rank, as phi learns from them.

    Attributes:
        shots: B renders.
        x_0: (B, ...) encoded, detached; zeros where a render was not finite.
        c2w: (B, 4, 4) poses.
        weight: (B,) 1, or 0 where a render was not finite.
    """

    shots: list[Shot]
    x_0: Tensor
    c2w: Tensor
    weight: Tensor


@dataclasses.dataclass
class Report:
    """What one rank tells about one update.

    Attributes:
        figures: gradient norms, phi's loss, opacity; each a list over particles, views or steps, of numbers or of tensors on the
            device, which means() reads.
        gaps: of each micro-batch, (B,) t / T and (B,) ||eps_pretrain - eps_phi||, on the device; empty without eps_phi.
        seconds: by stage.
        events: what went wrong and was mended, a line each.
        bad_particles: ids of particles whose step was skipped because their gradient was not finite.
    """

    figures: dict[str, list[float | Tensor]]
    gaps: list[tuple[Tensor, Tensor]]
    seconds: dict[str, float]
    events: list[str]
    bad_particles: list[int]

    def means(self) -> dict[str, float]:
        """Return the mean of each figure (a CPU-GPU sync), and the seconds as ``seconds/<stage>``."""
        means = {name: sum(map(float, values)) / len(values) for name, values in self.figures.items()}
        return means | {f"seconds/{name}": value for name, value in self.seconds.items()}


def update(state: TrainingState, index: int, measure: bool = False) -> Report:
    """Advance every particle of this rank by one Adam step, and phi by its steps (collective).

    Args:
        state: changed in place.
        index: of the update, from 0.
        measure: whether to wait for the GPU at the end of each stage, so that the seconds are true.
    """
    stopwatch = Stopwatch(state.prior.device, measure)
    report = Report(defaultdict(list), [], stopwatch.seconds, [], [])
    batches = micro_batches(state)
    gradients: ThetaGradients = {}
    renders = []
    for batch, following in itertools.zip_longest(batches, batches[1:], fillvalue=[]):
        state.residence.fetch(owners(state, batch))
        state.residence.prefetch(owners(state, following))
        renders.append(push_particles(state, batch, index, stopwatch, report, gradients))
        finished = [p for p in owners(state, batch) if not any(shot.particle == p.id for shot in following)]
        with stopwatch.stage("backward"):
            for particle in finished:
                step_particle(state, particle, index, report, gradients)
        state.residence.release(finished)
    if state.phi is not None:
        if state.phi.same_forwards:
            with stopwatch.stage("scores"):
                join_forwards(state, renders[-1], len(batches), index)
        with stopwatch.stage("phi"):
            for step in range(state.config.score.steps_per_update):
                update_phi(state, state.phi, renders, index, step, report)
    return report


# In the deterministic mode: the gradient of each view of each particle by itself.
ThetaGradients = dict[tuple[int, int], list[Tensor]]


def micro_batches(state: TrainingState) -> list[list[Shot]]:
    """Return this rank's renders of an update, particle after particle, in batches for the frozen networks."""
    shots = [Shot(particle.id, view) for particle in state.particles for view in state.layout.views]
    size = 1 if state.config.deterministic else state.config.micro_batch_size
    return [shots[i : i + size] for i in range(0, len(shots), size)]


def owners(state: TrainingState, shots: list[Shot]) -> list[OwnedParticle]:
    """Return the particles of some renders, each once."""
    wanted = dict.fromkeys(shot.particle for shot in shots)
    return [particle for particle in state.particles if particle.id in wanted]


def push_particles(
    state: TrainingState, shots: list[Shot], index: int, stopwatch: Stopwatch, report: Report, gradients: ThetaGradients
) -> Renders:
    """Render a micro-batch, ask both scores, and add the gradient to the particles'.

    Args:
        state: of the run.
        shots: B renders.
        index: of the update.
        stopwatch: takes the seconds by stage.
        report: takes norms.
        gradients: takes the gradients by view in the deterministic mode; otherwise they stay in theta's ``.grad``.

    Returns:
        The encoded renders from before the step.
    """
    config, prior, device = state.config, state.prior, state.prior.device
    thetas = {particle.id: particle.theta for particle in owners(state, shots)}

    # A camera and a render of each; theta's graph is kept.
    with stopwatch.stage("render"):
        dtype = next(thetas[shots[0].particle].parameters()).dtype
        cameras = draw_cameras(config, shots, index).to(device, dtype)
        images = [
            thetas[shot.particle].render(cameras[i : i + 1], config.render_size, key(config, "ray_jitter", shot, index))
            for i, shot in enumerate(shots)
        ]
        x_0 = prior.encode(torch.cat([render.image for render in images]))

    # The prior's score and the particles' own, at the same noised render.
    with stopwatch.stage("scores"), torch.no_grad():
        y_c = state.prompt.for_views(words_of(cameras, config.camera))
        y = state.prompt.plain[[0] * len(shots)].cond
        t = draw_t(config, shots, index, prior.schedule.num_timesteps).to(device)
        eps = draw_noise(config, "noise", shots, index, x_0)
        score = state.phi.score if state.phi is not None else None
        gradient = score_gradient(prior, score, x_0, t, eps, y_c, y, cameras.c2w, config.guidance_scale, config.timesteps.weighting)
        if score is not None:
            report.gaps.append((t / prior.schedule.num_timesteps, score_gap(prior, gradient, t, config.timesteps.weighting)))

    # The mean over a particle's views, of which the other ranks of the shard may hold some.
    with stopwatch.stage("backward"):
        for shot in shots:
            if shot.view == state.layout.views[0] or config.deterministic:
                thetas[shot.particle].zero_grad(set_to_none=True)
        share = 1.0 / state.layout.num_views
        penalty = sum(regularization(state, index, render.regularizers) for render in images)
        if isinstance(penalty, Tensor):
            torch.autograd.backward([x_0, penalty * share], [gradient * share, None])
        else:
            torch.autograd.backward(x_0, gradient * share)
        if config.deterministic:
            (shot,) = shots
            gradients[shot.particle, shot.view] = gradients_of(state, shot.particle)
    report.figures["theta/score_gradient_norm"].append(gradient.norm())
    report.figures["theta/opacity"].append(torch.stack([r.opacity.mean() for r in images]).mean().detach())
    finite = x_0.detach().isfinite().flatten(1).all(1)
    kept = x_0.detach().where(finite.view(-1, *[1] * (x_0.ndim - 1)), torch.zeros_like(x_0))
    return Renders(shots, kept, cameras.c2w, finite.to(x_0))


def score_gradient(
    prior: Prior,
    score: Score | None,
    x_0: Tensor,
    t: Tensor,
    eps: Tensor,
    y_c: TextEmbeddings,
    y: Tensor,
    c2w: Tensor,
    guidance_scale: float,
    weighting: str,
) -> Tensor:
    """Return the gradient with respect to x_0: of VSD with a score (ProlificDreamer, eq. 9), of SDS without (DreamFusion, eq. 3).

    Args:
        prior: the frozen model.
        score: eps_phi, or None.
        x_0: (B, ...) encoded renders.
        t: (B,) integer timesteps.
        eps: noise, like x_0.
        y_c: embeddings of the prompt with view words, of which eps_pretrain is asked.
        y: (B, num_tokens, width) embeddings of the plain prompt, of which eps_phi is asked.
        c2w: (B, 4, 4) poses.
        guidance_scale: s of eps_pretrain.
        weighting: name of w(t).

    Returns:
        Like x_0.
    """
    alpha_t, sigma_t = prior.schedule.alpha_sigma(t, x_0)
    x_t = add_noise(x_0, eps, alpha_t, sigma_t)
    w_t = timestep_weight(weighting, alpha_t, sigma_t)
    if score is None:
        return sds_gradient(eps_pretrain(prior, x_t, t, y_c, guidance_scale), eps, w_t)
    with score.pretrained():
        eps_prior = eps_pretrain(prior, x_t, t, y_c, guidance_scale)
    return vsd_gradient(eps_prior, score(x_t, t, y, c2w), w_t)


def score_gap(prior: Prior, gradient: Tensor, t: Tensor, weighting: str) -> Tensor:
    """Return ||eps_pretrain - eps_phi|| of each render, (B,), from VSD's gradient w(t) (eps_pretrain - eps_phi)."""
    w_t = timestep_weight(weighting, *prior.schedule.alpha_sigma(t, gradient))
    return (gradient / w_t).flatten(1).norm(dim=1)


def gradients_of(state: TrainingState, particle: int) -> list[Tensor]:
    """Return the gradients of a particle's parameters, in the order of its optimiser; zeros where none flowed."""
    owned = next(p for p in state.particles if p.id == particle)
    parameters = [p for group in owned.optimizer.param_groups for p in group["params"]]
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]


@torch.no_grad()
def join_forwards(state: TrainingState, renders: Renders, num_done: int, index: int) -> None:
    """Take part in the other ranks' passes through a sharded UNet when this rank has fewer micro-batches (ZeRO 3)."""
    config, prior = state.config, state.prior
    assert state.phi is not None
    t = draw_t(config, renders.shots, index, prior.schedule.num_timesteps).to(prior.device)
    texts = state.prompt.plain[[0] * len(renders.shots)]
    for _ in range(num_done, math.ceil(state.layout.max_renders / config.micro_batch_size)):
        score_gradient(
            prior,
            state.phi.score,
            renders.x_0,
            t,
            renders.x_0,
            texts,
            texts.cond,
            renders.c2w,
            config.guidance_scale,
            config.timesteps.weighting,
        )


def step_particle(state: TrainingState, particle: OwnedParticle, index: int, report: Report, gradients: ThetaGradients) -> None:
    """Take Adam's step of one particle (collective over its view axis); a gradient that is not finite skips the step."""
    parameters = [p for group in particle.optimizer.param_groups for p in group["params"]]
    if state.config.deterministic:
        order = [(particle.id, view) for view in range(state.layout.num_views)]
        total = state.collectives.sum_in_order({row: gradients.pop(row) for row in order if row in gradients}, order, "views")
    else:
        total = gradients_of(state, particle.id)
        state.collectives.sum_over_views(total)
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient
    norm = float(torch.nn.utils.get_total_norm(total))  # CPU-GPU sync
    report.figures["theta/gradient_norm"].append(norm)
    report.figures["theta/skipped"].append(0.0 if math.isfinite(norm) else 1.0)
    if not math.isfinite(norm):
        report.bad_particles.append(particle.id)
        return
    decay = learning_rate_factor(index / state.config.num_updates, state.config.final_lr_fraction)
    for group, start in zip(particle.optimizer.param_groups, particle.theta.parameter_groups(), strict=True):
        group["lr"] = start["lr"] * decay
    particle.optimizer.step()
    particle.theta.after_update(index, keyed_generator(state.config.seed, "occupancy", particle=particle.id, update=index))


def learning_rate_factor(progress: float, final_fraction: float) -> float:
    """Return the factor of theta's learning rates at a progress in [0, 1): 1 until DECAY_BEGINS, then linearly to final_fraction."""
    decayed = max(0.0, progress - DECAY_BEGINS) / (1.0 - DECAY_BEGINS)
    return 1.0 - (1.0 - final_fraction) * decayed


def update_phi(state: TrainingState, phi: PhiTrainer, batches: list[Renders], index: int, step: int, report: Report) -> None:
    """Take one AdamW step of phi on the renders of all particles of all ranks (collective).

    Each render's loss is divided by the global number of renders before backward, so that the sum over ranks is the mean
    whatever each rank's share. A gradient that is not finite is seen by all ranks after the sum, and all skip the step.

    Args:
        state: of the run.
        phi: with its optimiser.
        batches: this rank's renders, by micro-batch.
        index: of the update.
        step: of phi within the update.
        report: takes phi's loss (its mean over ranks is the mean denoising loss over all renders), and a skipped step.
    """
    config, layout = state.config, state.layout
    num_batches = math.ceil(layout.max_renders / config.micro_batch_size) if phi.same_batches else len(batches)
    total: Tensor | float = 0.0
    for number in range(num_batches):
        is_padding = number >= len(batches)  # a rank with fewer batches joins in the others' passes with a weight of zero
        batch = batches[min(number, len(batches) - 1)]
        weight = batch.weight * 0.0 if is_padding else batch.weight
        loss_of = phi_loss_of(state, batch, weight, index, step)
        renders = [(shot.particle, shot.view) for shot in batch.shots]
        total = total + phi.accumulate(loss_of, renders, number == num_batches - 1)
    warmup = min(1.0, (index + 1) / max(1, config.score.num_warmup_updates))
    # This rank's share of the global mean, so that the mean over ranks is it.
    report.figures["phi/loss"].append(float(total) * layout.world_size)  # CPU-GPU sync
    took_step = phi.step(config.score.lr * warmup)
    report.figures["phi/gradient_norm"].append(phi.gradient_norm)
    if not took_step:
        cause = "" if math.isfinite(float(total)) else " (this rank's loss is not finite)"
        report.events.append(f"phi's gradient is not finite: its step is skipped on all ranks{cause}")


def phi_loss_of(
    state: TrainingState, batch: Renders, weight: Tensor, index: int, step: int
) -> Callable[[Callable[..., Tensor]], Tensor]:
    """Return the summed, weighted denoising loss of a micro-batch / global count, as a function of eps_phi."""
    config, prior, x_0 = state.config, state.prior, batch.x_0
    t = draw_phi_t(config, batch.shots, index, step, prior.schedule.num_timesteps).to(x_0.device)
    eps = draw_noise(config, "phi_noise", batch.shots, index, x_0, step)
    c2w = batch.c2w * draw_kept_poses(config, batch.shots, index, step).to(x_0.device)[:, None, None]
    alpha_t, sigma_t = prior.schedule.alpha_sigma(t, x_0)
    x_t = add_noise(x_0, eps, alpha_t, sigma_t)
    y = state.prompt.plain[[0] * len(x_t)].cond

    def loss_of(eps_phi: Callable[..., Tensor]) -> Tensor:
        return (weight * phi_loss(eps_phi(x_t, t, y, c2w), eps)).sum() / state.layout.num_renders

    return loss_of


def regularization(state: TrainingState, index: int, regularizers: dict[str, Tensor]) -> Tensor | float:
    """Weigh a render's regularisers; 0.0 where there are none or none acts."""
    config = state.config.regularization
    acts = config.opacity > 0 or config.entropy > 0
    if not regularizers or not acts or index < config.begin_at * state.config.num_updates:
        return 0.0
    return config.opacity * regularizers["opacity"] + config.entropy * regularizers["entropy"]
