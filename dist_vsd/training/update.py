"""ONE update of all particles and of phi, in the order of ProlificDreamer's Algorithm 1. Read this file first.

    y^c = embed(prompt, c)        image = render(theta, c)        x_0 = encode(image)        x_t = add_noise(x_0, eps, t)
    gradient = vsd(eps_pretrain, eps_phi, w_t)                    theta <- Adam(backward(x_0, gradient))
    loss_phi = denoising loss of eps_phi on x_0, detached         phi's gradients summed over ranks / global count
    phi <- AdamW

Algorithm 1 steps one particle and then phi; here every particle takes its step, and phi then learns from the renders of
all of them, on all ranks, as one batch. Each random draw is keyed by (seed, particle, view, update, purpose).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras, look_at_origin, view_words
from dist_vsd.config import CameraConfig
from dist_vsd.diffusion.schedule import add_noise
from dist_vsd.diffusion.timesteps import draw_timesteps, max_fraction_at, timestep_weight
from dist_vsd.distributed.random import Purpose, keyed_generator
from dist_vsd.objectives.sds import sds_gradient
from dist_vsd.objectives.vsd import phi_loss, vsd_gradient
from dist_vsd.priors.prior import Prior, TextEmbeddings, eps_pretrain
from dist_vsd.score.score import Score
from dist_vsd.training.state import OwnedParticle, TrainingState

# Colours settle last: rates that fall from the start leave a duck without its orange beak.
DECAY_BEGINS = 0.6
# In fp16 the gradient of a mean over 16,384 coordinates falls below the smallest number on its way through the UNet.
PHI_LOSS_SCALE = {"fp32": 1.0, "bf16": 1.0, "fp16": 2.0**13}


@dataclasses.dataclass(frozen=True)
class Views:
    """The renders of one update on this rank, as phi learns from them.

    Attributes:
        particles: B particle ids.
        x_0: (B, ...) encoded renders, detached.
        c2w: (B, 4, 4) poses.
    """

    particles: list[int]
    x_0: Tensor
    c2w: Tensor


class Stopwatch:
    """Seconds by stage of an update; on a GPU each reading is a CPU-GPU sync, so it reads only when it is asked to."""

    def __init__(self, device: torch.device, synchronize: bool) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._synchronize = synchronize and device.type == "cuda"

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time inside the ``with`` to a stage."""
        begin = self._now()
        yield
        self.seconds[name] += self._now() - begin

    def _now(self) -> float:
        if self._synchronize:
            torch.cuda.synchronize()  # CPU-GPU sync
        return time.perf_counter()


def update(state: TrainingState, index: int, measure: bool = False) -> dict[str, float]:
    """Advance every particle of this rank by one Adam step, and phi by its steps (collective).

    Args:
        state: changed in place.
        index: of the update, from 0.
        measure: whether to wait for the GPU at the end of each stage, so that the seconds are true.

    Returns:
        This rank's figures: mean gradient norms, phi's loss over all ranks, seconds by stage.
    """
    config = state.config
    stopwatch = Stopwatch(state.prior.device, measure)
    figures: dict[str, list[float]] = defaultdict(list)
    batch = config.micro_batch_size
    groups = [state.particles[i : i + batch] for i in range(0, len(state.particles), batch)]
    views = [update_particles(state, group, index, stopwatch, figures) for group in groups]
    if state.score is not None:
        joined = Views([p for v in views for p in v.particles], torch.cat([v.x_0 for v in views]), torch.cat([v.c2w for v in views]))
        with stopwatch.stage("phi"):
            for step in range(config.score.steps_per_update):
                figures["phi/loss"].append(update_phi(state, joined, index, step))
    seconds = {f"seconds/{name}": value for name, value in stopwatch.seconds.items()}
    return {name: sum(values) / len(values) for name, values in figures.items()} | seconds


def update_particles(
    state: TrainingState, group: list[OwnedParticle], index: int, stopwatch: Stopwatch, figures: dict[str, list[float]]
) -> Views:
    """Advance some particles by one step each, in one batch through the frozen networks.

    Args:
        state: of the run.
        group: B particles.
        index: of the update.
        stopwatch: takes the seconds by stage.
        figures: takes gradient norms.

    Returns:
        The encoded renders from before the step.
    """
    config, prior, device = state.config, state.prior, state.prior.device
    ids = [particle.id for particle in group]

    # A camera and a render of each particle; theta's graph is kept.
    with stopwatch.stage("render"):
        cameras = draw_cameras(state, ids, index).to(device, next(group[0].theta.parameters()).dtype)
        renders = [
            particle.theta.render(cameras[i : i + 1], config.render_size, key(state, "ray_jitter", particle.id, index))
            for i, particle in enumerate(group)
        ]
        image = torch.cat([render.image for render in renders])
        x_0 = prior.encode(image)

    # The prior's score and the particles' own, at the same noised render.
    with stopwatch.stage("scores"), torch.no_grad():
        y_c = state.prompt.for_views(words_of(cameras, config.camera))
        y = state.prompt.plain[[0] * len(ids)].cond
        t = draw_t(state, ids, index).to(device)
        eps = draw_noise(state, "noise", ids, index, x_0)
        gradient = score_gradient(
            prior, state.score, x_0, t, eps, y_c, y, cameras.c2w, config.guidance_scale, config.timesteps.weighting
        )

    # theta <- Adam. Each particle's gradient is its own; only the ranks that share a particle average it.
    with stopwatch.stage("backward"):
        for particle in group:
            particle.optimizer.zero_grad(set_to_none=True)
        penalty = sum(regularization(state, index, render.regularizers) for render in renders)
        if isinstance(penalty, Tensor):
            torch.autograd.backward([x_0, penalty], [gradient, None])
        else:
            torch.autograd.backward(x_0, gradient)
        for particle in group:
            step_particle(state, particle, index, figures)
    figures["theta/score_gradient_norm"].append(float(gradient.norm()))
    figures["theta/opacity"].append(float(torch.stack([r.opacity.mean() for r in renders]).mean().detach()))
    return Views(ids, x_0.detach(), cameras.c2w)


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


def step_particle(state: TrainingState, particle: OwnedParticle, index: int, figures: dict[str, list[float]]) -> None:
    """Take Adam's step of one particle (collective over its view axis); a non-finite gradient skips the step."""
    gradients = [p.grad for group in particle.optimizer.param_groups for p in group["params"] if p.grad is not None]
    state.collectives.mean_over_views(gradients)
    norm = float(torch.nn.utils.get_total_norm(gradients))  # CPU-GPU sync
    figures["theta/gradient_norm"].append(norm)
    if not math.isfinite(norm):
        figures["theta/skipped"].append(1.0)
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


def update_phi(state: TrainingState, views: Views, index: int, step: int) -> float:
    """Take one AdamW step of phi on the renders of all particles of all ranks (collective).

    Each render's loss is divided by the global number of renders before backward, so that the sum over ranks is the mean
    whatever each rank's share. A non-finite gradient is seen by all ranks after the sum, and all skip the step.

    Args:
        state: of the run.
        views: this rank's renders.
        index: of the update.
        step: of phi within the update.

    Returns:
        The mean denoising loss over all renders of all ranks.
    """
    config, prior, score = state.config, state.prior, state.score
    assert score is not None
    assert state.phi_optimizer is not None
    global_count = config.num_particles * state.layout.num_views
    parameters = list(score.phi().values())
    warmup = min(1.0, (index + 1) / max(1, config.score.num_warmup_updates))
    for group in state.phi_optimizer.param_groups:
        group["lr"] = config.score.lr * warmup

    x_0, device = views.x_0, views.x_0.device
    generators = [key(state, "phi_timestep", p, index, step) for p in views.particles]
    t = torch.cat([draw_timesteps(torch.rand(1, generator=g), 0.0, 1.0, prior.schedule.num_timesteps) for g in generators]).to(device)
    eps = draw_noise(state, "phi_noise", views.particles, index, x_0, step)
    keep = [torch.rand(1, generator=key(state, "pose_dropout", p, index, step)) >= config.score.pose_dropout for p in views.particles]
    c2w = views.c2w * torch.cat(keep).to(device)[:, None, None]

    state.phi_optimizer.zero_grad(set_to_none=True)
    total, scale = 0.0, PHI_LOSS_SCALE[config.precision]
    for start in range(0, len(views.particles), config.micro_batch_size):
        rows = slice(start, start + config.micro_batch_size)
        alpha_t, sigma_t = prior.schedule.alpha_sigma(t[rows], x_0)
        x_t = add_noise(x_0[rows], eps[rows], alpha_t, sigma_t)
        y = state.prompt.plain[[0] * len(x_t)].cond
        loss = phi_loss(score(x_t, t[rows], y, c2w[rows]), eps[rows]).sum() / global_count
        (loss * scale).backward()
        total += float(loss.detach())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / scale
    loss_sum = torch.tensor([total], device=device)
    state.collectives.sum_over_ranks([*(p.grad for p in parameters), loss_sum])
    if all(bool(g.isfinite().all()) for g in (p.grad for p in parameters)):
        state.phi_optimizer.step()
    return float(loss_sum)


def key(state: TrainingState, purpose: Purpose, particle: int, index: int, step: int = 0) -> torch.Generator:
    """Return the generator of one draw of this rank's view of a particle."""
    return keyed_generator(state.config.seed, purpose, particle=particle, view=state.layout.view, update=index, step=step)


def draw_cameras(state: TrainingState, ids: list[int], index: int) -> Cameras:
    """Draw one camera for each particle (ProlificDreamer, appendix: uniform in azimuth, elevation, distance and fov)."""
    camera, batches = state.config.camera, []
    for particle in ids:
        generator = key(state, "camera", particle, index)
        azimuth = draw_from((-180.0, 180.0), generator)
        high = bool(torch.rand(1, generator=generator) < camera.high_elevation_share)
        elevation = draw_from(camera.high_elevation_deg if high else camera.elevation_deg, generator)
        distance, fov = draw_from(camera.distance, generator), draw_from(camera.fov_deg, generator)
        batches.append(look_at_origin(azimuth, elevation, distance, fov))
    return Cameras.cat(batches)


def draw_from(interval: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Draw (1,) from an interval, uniformly; fp64, so that poses are exact before they are rounded to theta's precision."""
    low, high = interval
    return low + (high - low) * torch.rand(1, generator=generator).double()


def words_of(cameras: Cameras, config: CameraConfig) -> list[str]:
    """Return the view words of each camera."""
    poses = zip(cameras.azimuth_deg.tolist(), cameras.elevation_deg.tolist(), strict=True)
    return [view_words(a, e, config.overhead_deg, config.front_deg) for a, e in poses]


def draw_t(state: TrainingState, ids: list[int], index: int) -> Tensor:
    """Draw each particle's t from the range of this update; (B,) int64."""
    timesteps = state.config.timesteps
    high = max_fraction_at(timesteps, index / state.config.num_updates)
    u = torch.cat([torch.rand(1, generator=key(state, "timestep", particle, index)) for particle in ids])
    return draw_timesteps(u, timesteps.min_fraction, high, state.prior.schedule.num_timesteps)


def draw_noise(state: TrainingState, purpose: Purpose, ids: list[int], index: int, like: Tensor, step: int = 0) -> Tensor:
    """Draw standard normal noise for each particle, shaped, placed and typed like ``like``."""
    shape = like.shape[1:]
    rows = [torch.randn(shape, generator=key(state, purpose, particle, index, step)) for particle in ids]
    return torch.stack(rows).to(like)


def regularization(state: TrainingState, index: int, regularizers: dict[str, Tensor]) -> Tensor | float:
    """Weigh a render's regularisers; 0.0 where there are none or none acts."""
    config = state.config.regularization
    acts = config.opacity > 0 or config.entropy > 0
    if not regularizers or not acts or index < config.begin_at * state.config.num_updates:
        return 0.0
    return config.opacity * regularizers["opacity"] + config.entropy * regularizers["entropy"]
