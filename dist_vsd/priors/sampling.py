"""Plain samples of a prior, which distillation is compared with.

By DDIM (Song et al. 2021) or DPM-Solver++ (Lu et al. 2022) where its process is variance preserving, by Euler's steps on a rectified flow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from dist_vsd.cameras import Cameras, turntable
from dist_vsd.diffusion.process import Process, VariancePreserving, shifted
from dist_vsd.priors.prior import Prior, TextEmbeddings, eps_pretrain, guided_prediction


def check_sampler(process: Process, num_steps: int, sampler: str) -> str:
    """Return the name of the sampler that is asked for, or the process's default.

    Args:
        process: of the prior.
        num_steps: of the sampler; diffusers' spacing of T timesteps overruns them from T - 1 on.
        sampler: one that follows the process; empty: its default.

    Raises:
        ValueError: another sampler, or too few or too many steps.
    """
    if sampler and sampler not in process.samplers:
        known = " or ".join(process.samplers)
        raise ValueError(f"sampler must be {known} for a prior with this process, got {sampler!r}: change it, or leave it empty")
    sampler = sampler or process.samplers[0]
    most = math.inf if sampler == "euler" else process.num_timesteps - 2
    if not 1 <= num_steps <= most:
        limits = "at least 1" if math.isinf(most) else f"between 1 and {most}"
        raise ValueError(f"num_steps must be {limits}, got {num_steps}: change --num-steps")
    return sampler


def build_scheduler(
    process: VariancePreserving, num_steps: int, sampler: str, device: torch.device | str
) -> DDIMScheduler | DPMSolverMultistepScheduler:
    """Make diffusers' scheduler of a sampler, given eps, on the timesteps that Stable Diffusion's pipelines use.

    Args:
        process: of the prior.
        num_steps: of the sampler, as check_sampler() lets pass.
        sampler: one of the process's; DDIM is deterministic (eta = 0), DPM-Solver++ the multistep solver of second order.
        device: of its timesteps.
    """
    # A schedule that ends in pure noise (alpha_T = 0) would divide by zero in x_0 = (x_t - sigma_t eps) / alpha_t.
    alphas_cumprod = process.alphas_cumprod.cpu().clamp_min(2.0**-24)
    betas = 1.0 - alphas_cumprod / torch.cat([torch.ones(1, dtype=alphas_cumprod.dtype), alphas_cumprod[:-1]])
    common = {
        "num_train_timesteps": process.num_timesteps,
        "trained_betas": betas.tolist(),
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    if sampler == "ddim":
        scheduler = DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=False)
    else:
        scheduler = DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++", solver_order=2)
    scheduler.set_timesteps(num_steps, device=device)
    return scheduler


@torch.no_grad()
def sample(
    prior: Prior,
    y: TextEmbeddings,
    noise: Tensor,
    num_steps: int,
    guidance_scale: float,
    sampler: str = "",
    cameras: Cameras | None = None,
) -> Tensor:
    """Follow the prior's probability flow from noise to samples.

    Args:
        prior: any frozen model.
        y: embeddings of B prompts.
        noise: (B, ...) x_T, standard normal.
        num_steps: calls of the network.
        guidance_scale: s; with Perp-Neg where ``y`` has negatives.
        sampler: one that follows the prior's process; empty: its default.
        cameras: B, for a prior that knows cameras (see Prior.predict).

    Returns:
        x_0, like ``noise``.

    Raises:
        ValueError: a sampler of another process, too many steps, or guidance without an unconditional text.
    """
    sampler = check_sampler(prior.process, num_steps, sampler)
    if sampler == "euler":
        return _euler(prior, y, noise, num_steps, guidance_scale, cameras)
    scheduler = build_scheduler(prior.process, num_steps, sampler, noise.device)
    x_t = noise
    for t in scheduler.timesteps:
        eps = eps_pretrain(prior, x_t, t.expand(len(x_t)), y, guidance_scale, cameras)
        x_t = scheduler.step(eps, t, x_t).prev_sample
    return x_t


def _euler(
    prior: Prior, y: TextEmbeddings, noise: Tensor, num_steps: int, guidance_scale: float, cameras: Cameras | None
) -> Tensor:
    """Follow a rectified flow, x <- x + (s' - s) v, in steps that are even before its shift (Liu et al. 2022)."""
    times = shifted(torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64), prior.process.shift).tolist()
    x_t = noise
    for s, s_next in zip(times, times[1:], strict=False):
        t = torch.full((len(x_t),), s, dtype=torch.float32, device=x_t.device)
        x_t = x_t + (s_next - s) * guided_prediction(prior, x_t, t, y, guidance_scale, cameras)
    return x_t


@torch.no_grad()
def sample_latents(
    prior: Prior,
    prompts: list[str],
    num_steps: int,
    guidance_scale: float,
    seeds: Sequence[int],
    sampler: str = "",
    cameras: Cameras | None = None,
) -> Tensor:
    """Draw one sample for each prompt: a picture, or the views of a shot.

    Args:
        prior: to draw from.
        prompts: B texts; or B V, one for each view of each sample.
        num_steps: of the sampler.
        guidance_scale: classifier-free guidance s.
        seeds: B seeds; a sample depends on its prompts, its cameras and its seed alone.
        sampler: one that follows the prior's process; empty: its default.
        cameras: V, from which each sample is seen, for a prior that knows cameras; None: a turn around the object, the front first.

    Returns:
        (B V, ...) x_0, sample by sample; V is 1 for most priors.

    Raises:
        ValueError: as of sample(), or a prompt that the prior can't read.
    """
    num_views = prior.views_per_shot
    shapes = (num_views, *prior.latent_shape)
    noise = torch.cat([torch.randn(shapes, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    if len(prompts) != len(noise):
        prompts = [prompt for prompt in prompts for _ in range(num_views)]
    seen_from = None
    if prior.knows_cameras:
        turn = cameras or turntable(num_views, elevation_deg=15.0, distance=2.9, fov_deg=41.0)
        seen_from = Cameras.cat([turn] * len(seeds)).to(prior.device)
    return sample(prior, prior.embed(prompts), noise.to(prior.device), num_steps, guidance_scale, sampler, seen_from)


def sample_images(
    prior: Prior,
    prompts: list[str],
    num_steps: int,
    guidance_scale: float,
    seeds: Sequence[int],
    sampler: str = "",
    cameras: Cameras | None = None,
) -> Tensor:
    """Draw one sample for each prompt, as ``sample_latents``, and return pictures: (B V, 3, H, W) in [0, 1] on the CPU."""
    with torch.no_grad():
        return prior.decode(sample_latents(prior, prompts, num_steps, guidance_scale, seeds, sampler, cameras)).cpu()
