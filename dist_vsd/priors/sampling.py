"""Pictures drawn from a prior by DDIM (Song et al. 2021), through diffusers' own pipeline."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from dist_vsd.priors.pipeline_folder import PipelineFolder, check_vocabulary, find_pipeline
from dist_vsd.priors.stable_diffusion import StableDiffusionPrior


def load_pipeline(prior: str, device: torch.device | str = "cpu") -> tuple[StableDiffusionPipeline, PipelineFolder]:
    """Load a prior as diffusers' pipeline, with a DDIM scheduler.

    Args:
        prior: "embedded", a folder, or a hub id.
        device: of the networks.

    Raises:
        ValueError: the prior can't be used.
    """
    folder = find_pipeline(prior)
    StableDiffusionPrior.load(prior)  # refuses weights that lack a tensor, which the pipeline would fill at random
    diffusers_logging.disable_progress_bar()
    variant = next((v for v in folder.variants.values() if v), None)
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder.path, use_safetensors=True, local_files_only=True, variant=variant,
            safety_checker=None, requires_safety_checker=False, feature_extractor=None,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"prior {prior!r} can't be loaded ({reason}): copy the whole pipeline folder anew") from error
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, torch.float32), folder


def sample(
    pipeline: StableDiffusionPipeline,
    folder: PipelineFolder,
    prompts: list[str],
    num_steps: int,
    guidance_scale: float,
    seeds: list[int],
) -> Tensor:
    """Draw one picture for each prompt.

    Args:
        pipeline, folder: of load_pipeline.
        prompts: B texts.
        num_steps: DDIM steps.
        guidance_scale: classifier-free guidance s.
        seeds: B seeds; a picture depends on its prompt and its seed alone.

    Returns:
        (B, 3, H, W) in [0, 1] on the CPU.

    Raises:
        ValueError: a word is unknown to a prior with a closed vocabulary.
    """
    check_vocabulary(prompts, folder)
    channels, size = pipeline.unet.config.in_channels, pipeline.unet.config.sample_size
    noise = [torch.randn(channels, size, size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = torch.stack(noise).to(pipeline.device)
    output = pipeline(
        prompts, num_inference_steps=num_steps, guidance_scale=guidance_scale, latents=latents, output_type="pt"
    )
    return output.images.float().cpu()
