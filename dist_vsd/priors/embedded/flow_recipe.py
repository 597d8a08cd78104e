"""`dist-vsd prior train --kind flow`: a rectified flow by a transformer, as Stable Diffusion 3 is, of the embedded prior's world.

pictures -> latents of the base's VAE -> transformer and text encoder -> a StableDiffusion3Pipeline folder -> measurements -> card
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor

from dist_vsd.diffusion.process import add_noise, velocity
from dist_vsd.priors.embedded.captions import Subject, draw_caption, write_tokenizer
from dist_vsd.priors.embedded.flow_networks import FlowNetworks, encode_texts, predict_velocity, start_networks
from dist_vsd.priors.embedded.losses import draw_indices, tokenize
from dist_vsd.priors.embedded.pictures import Pictures
from dist_vsd.priors.embedded.recipe import Report, kept_latents, make_pictures
from dist_vsd.priors.embedded.recipe_config import FlowRecipeConfig
from dist_vsd.priors.embedded.stage import LossFunction, StageSettings, train_stage
from dist_vsd.priors.pipeline_folder import FACTS_FILE

# s is drawn by a logistic of a normal number (Esser et al. 2024, equation 19), a little wider than SD3's: distillation asks at every s.
LOGIT_MEAN, LOGIT_STD = 0.2, 1.2
LEAST_S = 1e-3
# Of the scheduler. 25 steps of Euler end 0.096, 0.063 and 0.058 (rms of latents) away from 100 steps at 1, 2 and 3 (flow_shift.py of
# benchmarks/). At 2 the later half of a distillation's t reaches to s = 0.67, about as noisy as Stable Diffusion's T / 2 (s = 0.62); at 3
# to 0.75.
SHIFT = 2.0


def draw_s(count: int, generator: torch.Generator) -> Tensor:
    """Draw (count,) s, stratified: each follows the logit-normal distribution and the loss varies less from step to step."""
    u = (torch.rand(1, generator=generator) + torch.arange(count) / count) % 1
    normal = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
    return torch.sigmoid(LOGIT_MEAN + LOGIT_STD * normal).clamp(LEAST_S, 1.0)


def flow_loss(networks: FlowNetworks, latents: Tensor, subjects: list[Subject], batch: int, device: torch.device) -> LossFunction:
    """The loss of conditional flow matching, |v - (eps - x_0)|^2 (Esser et al. 2024, equation 13), with captions that leave words out.

    Args:
        networks: on ``device``.
        latents: (2, N, 2, 4, h, w), of encode_pictures.
        subjects: N.
        batch: pictures a step.
        device: of the networks.
    """
    scaling_factor = networks.vae.config.scaling_factor

    def loss(step: int, generator: torch.Generator) -> Tensor:
        indices, mirrored = draw_indices(len(subjects), batch, generator)
        mean, std = latents[mirrored.long(), indices].float().to(device).unbind(1)
        x_0 = scaling_factor * (mean + std * torch.randn(mean.shape, generator=generator).to(device))
        captions = [draw_caption(subjects[i], generator) for i in indices.tolist()]
        s = draw_s(batch, generator).to(device)
        eps = torch.randn(x_0.shape, generator=generator).to(device)
        sigma_s = s[:, None, None, None]
        x_s = add_noise(x_0, eps, 1 - sigma_s, sigma_s)
        words, pooled = encode_texts(networks.text_encoder, tokenize(networks.tokenizer, captions).to(device))
        predicted = predict_velocity(networks.transformer, x_s, s, words, pooled)
        return (predicted - velocity(eps, x_0)).square().mean()

    return loss


def train_flow(config: FlowRecipeConfig, base: Path, work: Path, device: torch.device, report: Report) -> tuple[FlowNetworks, Pictures]:
    """Run every stage, each from where it was left.

    Args:
        config: lengths and seed.
        base: a pipeline folder of the single-view recipe.
        work: folder of the pictures, which are those of the single-view recipe, and of the stage's state.
        device: to train on.
        report: called with (stage, done, total, figures).

    Returns:
        The networks, on ``device``, and the held-out pictures.
    """
    shown, held_out = make_pictures(config, work, report)

    torch.manual_seed(config.seed + 4)
    networks = start_networks(base, work / "tokenizer")
    for network in (networks.transformer, networks.text_encoder, networks.vae):
        network.to(device)
    latents = kept_latents(networks.vae, shown, work / "flow_latents.safetensors", device)
    settings = StageSettings(name="flow", num_steps=config.steps, learning_rate=config.learning_rate, num_warmup_steps=200, save_every=100)
    trained = {"transformer": networks.transformer, "text_encoder": networks.text_encoder}
    loss = flow_loss(networks, latents, shown.subjects, config.batch, device)
    train_stage(settings, trained, loss, work, config.seed, device, report)
    for network in trained.values():
        network.requires_grad_(False).eval()
    return networks, held_out


def write_flow(networks: FlowNetworks, base: Path, folder: Path) -> None:
    """Write a StableDiffusion3Pipeline folder in fp16 safetensors, its VAE the base's, and the facts that dist_vsd reads.

    Args:
        networks: trained; on the CPU and in fp16 from then on.
        base: the folder that they were made from.
        folder: to write.
    """
    write_tokenizer(folder / "tokenizer")
    parts = {"transformer": networks.transformer, "text_encoder": networks.text_encoder, "tokenizer": networks.tokenizer}
    absent = dict.fromkeys(("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)
    pipeline = StableDiffusion3Pipeline(**parts, **absent, vae=networks.vae, scheduler=scheduler)
    pipeline.to("cpu", torch.float16).save_pretrained(folder)
    shutil.copytree(base / "vae", folder / "vae", dirs_exist_ok=True)  # as it is: diffusers writes where it was loaded from beside it
    config = folder / "vae" / "config.json"
    settings = json.loads(config.read_text()) | {"shift_factor": 0.0}  # that of SD3's VAE: diffusers' pipeline adds it
    config.write_text(json.dumps(settings, indent=2) + "\n")
    facts = json.loads((base / FACTS_FILE).read_text()) | {"t5_tokens": 0}
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n")
