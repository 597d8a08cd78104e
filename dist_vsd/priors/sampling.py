"""Plain samples of a prior, by DDIM (Song et al. 2021) or DPM-Solver++ (Lu et al. 2022): what distillation is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from dist_vsd.diffusion.schedule import NoiseSchedule
from dist_vsd.priors.prior import Prior, TextEmbeddings, eps_pretrain
from dist_vsd.priors.samplers import SAMPLERS
from dist_vsd.priors.stable_diffusion import StableDiffusionPrior


def build_scheduler(
    schedule: NoiseSchedule, num_steps: int, sampler: str, device: torch.device | str
) -> DDIMScheduler | DPMSolverMultistepScheduler:
    """Make diffusers' scheduler of a sampler, given eps, on the timesteps that Stable Diffusion's pipelines use.

    Args:
        schedule: of the prior.
        num_steps: of the sampler, at most two below the number of timesteps, which diffusers' spacing would overrun.
        sampler: one of SAMPLERS; DDIM is deterministic (eta = 0), DPM-Solver++ the multistep solver of second order.
        device: of its timesteps.

    Raises:
        ValueError: an unknown sampler or too many steps.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be {' or '.join(SAMPLERS)}, got {sampler!r}: change --sampler")
    if not 1 <= num_steps <= schedule.num_timesteps - 2:
        raise ValueError(f"num_steps must be between 1 and {schedule.num_timesteps - 2}, got {num_steps}: change --num-steps")
    # A schedule that ends in pure noise (alpha_T = 0) would divide by zero in x_0 = (x_t - sigma_t eps) / alpha_t.
    alphas_cumprod = schedule.alphas_cumprod.cpu().clamp_min(2.0**-24)
    betas = 1.0 - alphas_cumprod / torch.cat([torch.ones(1, dtype=alphas_cumprod.dtype), alphas_cumprod[:-1]])
    common = {
        "num_train_timesteps": schedule.num_timesteps,
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
def sample(prior: Prior, y: TextEmbeddings, noise: Tensor, num_steps: int, guidance_scale: float, sampler: str = "ddim") -> Tensor:
    """Follow the prior's probability flow from noise to samples.

    Args:
        prior: any frozen model.
        y: embeddings of B prompts.
        noise: (B, ...) x_T, standard normal.
        num_steps: calls of the network.
        guidance_scale: s; with Perp-Neg where ``y`` has negatives.
        sampler: one of SAMPLERS.

    Returns:
        x_0, like ``noise``.

    Raises:
        ValueError: an unknown sampler, too many steps, or guidance without an unconditional text.
    """
    scheduler = build_scheduler(prior.schedule, num_steps, sampler, noise.device)
    x_t = noise
    for t in scheduler.timesteps:
        eps = eps_pretrain(prior, x_t, t.expand(len(x_t)), y, guidance_scale)
        x_t = scheduler.step(eps, t, x_t).prev_sample
    return x_t


@torch.no_grad()
def sample_images(
    prior: StableDiffusionPrior,
    prompts: list[str],
    num_steps: int,
    guidance_scale: float,
    seeds: Sequence[int],
    sampler: str = "ddim",
) -> Tensor:
    """Draw one picture for each prompt.

    Args:
        prior: to draw from.
        prompts: B texts.
        num_steps: of the sampler.
        guidance_scale: classifier-free guidance s.
        seeds: B seeds; a picture depends on its prompt and its seed alone.
        sampler: one of SAMPLERS.

    Returns:
        (B, 3, H, W) in [0, 1] on the CPU.

    Raises:
        ValueError: as of sample(), or a prompt that the prior can't read.
    """
    noise = torch.stack([torch.randn(prior.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    x_0 = sample(prior, prior.embed(prompts), noise.to(prior.device), num_steps, guidance_scale, sampler)
    return prior.decode(x_0).cpu()
