"""ONE update of all particles and of phi, in the order of ProlificDreamer's Algorithm 1. Read this file first.

    y^c = embed(prompt, c)        image = render(theta, c)        x_0 = encode(image)        x_t = add_noise(x_0, eps, t)
    gradient = vsd(eps_pretrain, eps_phi, w_t)                    theta <- Adam(backward(x_0, gradient))
    loss_phi = denoising loss of eps_phi on x_0, detached         phi's gradients summed over ranks / global count
    phi <- AdamW

Algorithm 1 steps one particle and then phi; here every particle takes its step, and phi then learns from the renders of
all of them, on all ranks, as one batch. Each random draw is keyed by (seed, particle, view, update, purpose).

pull.py holds the third line for each objective, phi_step.py the last three.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.distributed.random import keyed_generator
from dist_vsd.objectives.ancestral import ancestral_sample
from dist_vsd.particles.particle import Render
from dist_vsd.priors.stable_diffusion import StableDiffusionPrior
from dist_vsd.score.camera_embedding import pose_of
from dist_vsd.score.score import Score
from dist_vsd.training.draws import Shot, choose_particles, draw_cameras, draw_noise, draw_t, key
from dist_vsd.training.owned_particle import OwnedParticle
from dist_vsd.training.phi_step import ReusedPass, number_of_passes, take_step, update_phi
from dist_vsd.training.pull import clip_objective, score_gap, score_gradient
from dist_vsd.training.renders import Renders, absent_render, in_micro_batches
from dist_vsd.training.report import Report
from dist_vsd.training.state import TrainingState
from dist_vsd.training.stopwatch import Stopwatch

# Colours settle last: rates that fall from the start leave a duck without its orange beak.
DECAY_BEGINS = 0.6


def update(state: TrainingState, index: int, measure: bool = False) -> Report:
    """Advance the chosen particles of this rank by one Adam step each, and phi by its steps (collective).

    Args:
        state: changed in place.
        index: of the update, from 0.
        measure: whether to wait for the GPU at the end of each stage, so that the seconds are true.
    """
    config, layout = state.config, state.layout
    stopwatch = Stopwatch(state.prior.device, measure)
    report = Report(stopwatch.seconds)
    if config.objective == "ancestral":
        with stopwatch.stage("scores"):
            sample_particles(state, index)
        return report
    chosen = choose_particles(config, layout.num_particles, index)
    pushed, seen = micro_batches(state, chosen.theta), micro_batches(state, chosen.phi - chosen.theta)
    most = chosen.most_on_a_rank(chosen.theta, layout)
    score: Score | None = state.phi.score if state.phi is not None else None
    if state.phi is not None and config.score.reuse_pass:
        count = len(chosen.phi) * layout.num_views
        score = ReusedPass(state, state.phi, count, number_of_passes(state, state.phi, len(pushed), most))
    gradients: ThetaGradients = {}
    renders = []
    for batch, following in itertools.zip_longest(pushed + seen, (pushed + seen)[1:], fillvalue=[]):
        state.residence.fetch(owners(state, batch))
        state.residence.prefetch(owners(state, following))
        finished = [p for p in owners(state, batch) if not any(shot.particle == p.id for shot in following)]
        if batch[0].particle in chosen.theta:
            renders += push_particles(state, score, batch, index, stopwatch, report, gradients)
            with stopwatch.stage("backward"):
                for particle in finished:
                    step_particle(state, particle, index, report, gradients)
        elif state.phi is not None:
            with stopwatch.stage("render"):
                renders.append(look_at_particles(state, batch, index))
        state.residence.release(finished)
    if state.phi is None:
        return report
    if state.phi.same_forwards or isinstance(score, ReusedPass):
        with stopwatch.stage("scores"):
            join_passes(state, score, number_of_passes(state, state.phi, len(pushed), most) - len(pushed), index)
    with stopwatch.stage("phi"):
        if isinstance(score, ReusedPass):
            take_step(state, state.phi, score.total, chosen, index, report)
            return report
        batches = in_micro_batches(renders, chosen.phi, state.micro_batch_size)
        for step in range(config.score.steps_per_update):
            update_phi(state, state.phi, batches, chosen, index, step, report)
    return report


# In the deterministic mode: the gradient of each view of each particle by itself.
ThetaGradients = dict[tuple[int, int], list[Tensor]]


def micro_batches(state: TrainingState, chosen: frozenset[int]) -> list[list[Shot]]:
    """Return this rank's renders of some particles, particle after particle, in batches for the frozen networks."""
    particles = [particle for particle in state.particles if particle.id in chosen]
    shots = [Shot(particle.id, view) for particle in particles for view in state.layout.views]
    return [shots[i : i + state.micro_batch_size] for i in range(0, len(shots), state.micro_batch_size)]


def owners(state: TrainingState, shots: list[Shot]) -> list[OwnedParticle]:
    """Return the particles of some renders, each once."""
    wanted = dict.fromkeys(shot.particle for shot in shots)
    return [particle for particle in state.particles if particle.id in wanted]


def push_particles(
    state: TrainingState,
    score: Score | None,
    shots: list[Shot],
    index: int,
    stopwatch: Stopwatch,
    report: Report,
    gradients: ThetaGradients,
) -> list[Renders]:
    """Render a micro-batch, ask both scores, and add the gradient to the particles'.

    Args:
        state: of the run.
        score: eps_phi, or None for an objective without.
        shots: B renders.
        index: of the update.
        stopwatch: takes the seconds by stage.
        report: takes norms.
        gradients: takes the gradients by view in the deterministic mode; otherwise they stay in theta's ``.grad``.

    Returns:
        The encoded renders from before the step, for phi; none for an objective that encodes nothing.
    """
    config, prior, layout = state.config, state.prior, state.layout
    thetas = {particle.id: particle.theta for particle in owners(state, shots)}
    x_0, pulled, renders = None, [], []

    # A camera and a render of each; theta's graph is kept.
    with stopwatch.stage("render"):
        cameras, images = render_shots(state, shots, index)
        if config.objective != "clip":
            x_0 = encode(state, images)

    # The prior's score and the particles' own, at the same noised render.
    with stopwatch.stage("scores"):
        if x_0 is None:
            pulled.append((clip_objective(state, shots, images, cameras, index, report), None))
        else:
            y_c = state.prompt.for_cameras(cameras, config.camera)
            y = state.prompt.plain.cond.expand(len(shots))
            t = draw_t(config, shots, index, prior.process).to(prior.device)
            eps = draw_noise(config, "noise", shots, index, x_0)
            pose = pose_of(cameras, config.score.camera) * (0.0 if config.is_flat else 1.0)
            if isinstance(score, ReusedPass):
                score.shots, score.x_0, score.eps = shots, x_0, eps
            gradient = score_gradient(config, prior, score, x_0, t, eps, y_c, y, pose)
            pulled.append((x_0, gradient))
            renders.append(Renders.of(shots, x_0, pose))
            report.figures["theta/score_gradient_norm"].append(gradient.norm())
            if score is not None:
                report.gaps.append((prior.process.fraction(t), score_gap(prior, gradient, t, config.timesteps.weighting)))

    # The mean over a particle's views, of which the other ranks of the shard may hold some.
    with stopwatch.stage("backward"):
        for shot in shots:
            if shot.view == layout.views[0] or config.deterministic:
                thetas[shot.particle].zero_grad(set_to_none=True)
        penalty = sum(regularization(state, index, render) for render in images)
        if config.regularization.reconstruction > 0 and x_0 is not None:
            penalty = penalty + config.regularization.reconstruction * reconstruction_loss(state.prior, images, x_0)
        if isinstance(penalty, Tensor):
            pulled.append((penalty, None))
        # Multiplying by 1 / views before backward: the chain is linear.
        share = 1.0 / layout.num_views
        roots, cotangents = zip(*((root, share * (torch.ones_like(root) if g is None else g)) for root, g in pulled), strict=True)
        torch.autograd.backward(roots, cotangents)
        if config.deterministic:
            (shot,) = shots
            gradients[shot.particle, shot.view] = gradients_of(state, shot.particle)
    report.figures["theta/opacity"].append(torch.stack([r.opacity.mean() for r in images]).mean().detach())
    return renders


def render_shots(state: TrainingState, shots: list[Shot], index: int) -> tuple[Cameras, list[Render]]:
    """Draw the cameras of B renders, and render each; theta's graph is kept unless gradients are off."""
    config = state.config
    thetas = {particle.id: particle.theta for particle in owners(state, shots)}
    cameras = draw_cameras(config, shots, index).to(state.prior.device, next(thetas[shots[0].particle].parameters()).dtype)
    return cameras, [
        thetas[shot.particle].render(cameras[i : i + 1], config.render_size, key(config, "ray_jitter", shot, index))
        for i, shot in enumerate(shots)
    ]


def reconstruction_loss(prior: StableDiffusionPrior, images: list[Render], x_0: Tensor) -> Tensor:
    """Return the sum over renders of the mean ||image - D(x_0)||^2 over pixels; the gradient flows to the images, not through D or E.

    An encoder sees much less than a picture holds, and the score moves a picture that is free in every pixel, or a network of
    its coordinates, to what only the encoder takes for the prompt. This keeps it near the picture that its latent stands for.

    Args:
        prior: whose decoder D is.
        images: B renders.
        x_0: (B, ...) them, encoded.
    """
    image = torch.cat([render.image for render in images])
    with torch.no_grad():
        decoded = torch.nn.functional.interpolate(prior.decode(x_0).float(), image.shape[-2:], mode="bilinear", antialias=True)
    return (image - decoded).square().flatten(1).mean(1).sum()


def encode(state: TrainingState, images: list[Render]) -> Tensor:
    """Return x_0 = E(g(theta, c)) of renders, (B, ...); a latent particle is its own x_0."""
    image = torch.cat([render.image for render in images])
    return image if state.particles[0].theta.is_latent else state.prior.encode(image)


@torch.no_grad()
def look_at_particles(state: TrainingState, shots: list[Shot], index: int) -> Renders:
    """Render and encode particles that take no step in this update, for phi alone."""
    config = state.config
    cameras, images = render_shots(state, shots, index)
    pose = pose_of(cameras, config.score.camera) * (0.0 if config.is_flat else 1.0)
    return Renders.of(shots, encode(state, images), pose)


@torch.no_grad()
def sample_particles(state: TrainingState, index: int) -> None:
    """Set every particle of this rank to a sample of the prior, in the first update; the noise is keyed by the particle."""
    if index:
        return
    config, prior = state.config, state.prior
    size = state.micro_batch_size
    for batch in (state.particles[i : i + size] for i in range(0, len(state.particles), size)):
        state.residence.fetch(batch)
        generators = [keyed_generator(config.seed, "ancestral", particle=particle.id) for particle in batch]
        noise = torch.stack([torch.randn(prior.latent_shape, generator=generator) for generator in generators]).to(prior.device)
        y = state.prompt.plain[[0] * len(batch)]
        x_0 = ancestral_sample(prior, y, noise, config.guidance_scale, config.ancestral)
        pictures = x_0 if batch[0].theta.is_latent else prior.decode(x_0)
        for particle, picture in zip(batch, pictures, strict=True):
            particle.theta.become(picture)
        state.residence.release(batch)


def gradients_of(state: TrainingState, particle: int) -> list[Tensor]:
    """Return the gradients of a particle's parameters, in the order of its optimiser; zeros where none flowed."""
    owned = next(p for p in state.particles if p.id == particle)
    parameters = [p for group in owned.optimizer.param_groups for p in group["params"]]
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]


def join_passes(state: TrainingState, score: Score | None, count: int, index: int) -> None:
    """Take part, with a weight of zero, in passes of the other ranks through phi's UNet, where this rank has fewer micro-batches."""
    config, prior, render = state.config, state.prior, absent_render(state)
    t = draw_t(config, render.shots, index, prior.process).to(prior.device)
    y_c = state.prompt.for_cameras(draw_cameras(config, render.shots, index).to(prior.device), config.camera)
    if isinstance(score, ReusedPass):
        score.shots, score.x_0, score.eps, score.weight = render.shots, render.x_0, render.x_0, 0.0
    for _ in range(count):
        score_gradient(config, prior, score, render.x_0, t, render.x_0, y_c, state.prompt.plain.cond, render.pose)


def step_particle(state: TrainingState, particle: OwnedParticle, index: int, report: Report, gradients: ThetaGradients) -> None:
    """Take Adam's step of one particle (collective over its view axis); a gradient that is not finite skips the step."""
    parameters = [p for group in particle.optimizer.param_groups for p in group["params"]]
    if state.config.deterministic:
        order = [(particle.id, view) for view in range(state.layout.num_views)]
        rows = {row: gradients.pop(row) for row in order if row in gradients}
        total = state.collectives.sum_in_order(rows, order, "views", parameters)
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


def regularization(state: TrainingState, index: int, render: Render) -> Tensor | float:
    """Weigh a render's regularisers; 0.0 where there are none or none acts."""
    config = state.config.regularization
    weights = {"opacity": config.opacity, "entropy": config.entropy, "depth_variance": config.depth_variance}
    if not render.regularizers or index < config.begin_at * state.config.num_updates:
        return 0.0
    return sum((weight * render.regularizers[name]() for name, weight in weights.items() if weight > 0), start=0.0)
