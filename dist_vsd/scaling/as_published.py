"""The same update the way the two public implementations make it, with our code: what `bench update --as-published` compares with.

As read in thu-ml/prolificdreamer (main.py, nerf/sd.py, nerf/utils.py and the command lines of its README) and in
threestudio-project/threestudio (models/guidance/stable_diffusion_vsd_guidance.py). Both train one particle an iteration, on one view; both
keep a UNet of its own for phi beside the prior's, compute the text's keys and values in every pass, make a pass for eps_phi and another
one to train it, and wait for the GPU where they look at losses. thu-ml computes in fp32 and samples every ray whole. threestudio has
fp16 networks with fp32 LoRA layers, and evaluates a second branch of eps_phi, which its guidance_scale_lora of 1 then makes useless.
"""

from __future__ import annotations

import dataclasses

import torch

from dist_vsd.config import RunConfig
from dist_vsd.priors.stable_diffusion import DenoisingUnet, StableDiffusionPrior
from dist_vsd.scaling.update_bench import Way
from dist_vsd.training.state import TrainingState

DIFFERS = (
    "the field, its sampler and the cameras are ours, in torch: thu-ml places a third of its samples by density, threestudio has CUDA",
    "phi's own UNet has the prior's architecture and its process: theirs is 2.1 with v-prediction beside 2.1-base, of the same size",
    "x_0 is the mean of the encoder's posterior: theirs is a sample of it",
    "the CPU waits for the device after each of the four stages: theirs wait as often, at other places (losses, checks for NaN)",
    "checkpoints, validation pictures and logging are left out of all",
)
THU_ML_SAMPLES, THREESTUDIO_SAMPLES = 64 + 32, 512  # of a ray
# A share of eps_phi without the camera that no figure shows, but for which both branches are evaluated.
SECOND_BRANCH = 1e-9
ALWAYS_OCCUPIED = -1.0  # of the occupancy threshold: no cell is ever empty


def published_ways(config: RunConfig, can_fp16: bool, has_real_size: bool) -> list[Way]:
    """Return thu-ml's and threestudio's way of a configuration.

    Args:
        config: of our way.
        can_fp16: whether the machine computes in fp16, as threestudio does; else its precision is ours.
        has_real_size: whether rays are to have the originals' numbers of samples; else they have ours.
    """
    score = dataclasses.replace(config.score, reuse_pass=False, entropy_weight=0.0, steps_per_update=1, prior=config.prior)
    plain = dataclasses.replace(
        config,
        score=score,
        particles=dataclasses.replace(config.particles, theta_batch=1, phi_batch=1, offload=False),
        micro_batch_size=1,
        attention="sdpa",
        compile="off",
        deterministic=False,
    )
    samples = (THU_ML_SAMPLES, THREESTUDIO_SAMPLES) if has_real_size else (config.field.num_samples,) * 2
    every_sample = dataclasses.replace(config.field, samples_per_ray=0, visible_per_ray=0, hidden_below=0.0, tile_points=0)
    whole_rays = dataclasses.replace(every_sample, num_samples=samples[0], occupancy_threshold=ALWAYS_OCCUPIED)
    thu_ml = dataclasses.replace(plain, precision="fp32", field=whole_rays)
    threestudio = dataclasses.replace(
        plain,
        precision="fp16" if can_fp16 else config.precision,
        score=dataclasses.replace(score, entropy_weight=SECOND_BRANCH),
        field=dataclasses.replace(every_sample, num_samples=samples[1]),
    )
    notes = () if can_fp16 else (f"threestudio computes in fp16, which needs a GPU: {config.precision} here",)
    return [
        Way(name="thu-ml", config=thu_ml, waits=True, change=undo),
        Way(name="threestudio", config=threestudio, waits=True, change=undo, notes=notes),
    ]


def undo(state: TrainingState) -> None:
    """Take back what makes our networks' passes cheaper: channels-last, the text projected once, LoRA in the network's precision."""
    assert state.phi is not None
    assert isinstance(state.prior, StableDiffusionPrior)
    state.phi.score.casts_once = False
    networks = (state.prior.network, state.phi.score.network)
    for network in networks:
        assert isinstance(network, DenoisingUnet)
        network.takes_projected = False
        network.to(memory_format=torch.contiguous_format)
    state.prior.vae.to(memory_format=torch.contiguous_format)
