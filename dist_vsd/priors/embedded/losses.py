"""The losses that train the embedded prior's networks, as functions from (step, generator) to a scalar."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from dist_vsd.priors.embedded.captions import Subject, draw_caption
from dist_vsd.priors.embedded.captions import caption as write_caption
from dist_vsd.priors.embedded.pictures import Pictures
from dist_vsd.priors.embedded.stage import LossFunction

KL_WEIGHT = 2e-4
MAX_INPUT_NOISE = 0.06


def draw_indices(count: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw (batch,) picture indices and (batch,) flags whether each is mirrored."""
    return torch.randint(count, (batch,), generator=generator), torch.rand(batch, generator=generator) < 0.5


def fade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Fade a quarter of the pictures towards white, as unfinished renders are.

    Args:
        images: (B, 3, H, W) in [0, 1].
        generator: on the CPU.
    """
    chosen, strength = torch.rand(2, images.shape[0], 1, 1, 1, generator=generator).to(images.device)
    opacity = torch.where(chosen < 0.25, 0.3 + 0.7 * strength, torch.ones_like(strength))
    return 1 - opacity * (1 - images)


def add_pixel_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Add white noise of a random strength up to MAX_INPUT_NOISE to each (B, 3, H, W) image."""
    strength = MAX_INPUT_NOISE * torch.rand(images.shape[0], 1, 1, 1, generator=generator)
    return images + (strength * torch.randn(images.shape, generator=generator)).to(images.device)


def vae_loss(vae: AutoencoderKL, pictures: Pictures, batch: int, device: torch.device) -> LossFunction:
    """Reconstruct a picture from a slightly noisy copy; a little KL keeps the latents smooth (Kingma and Welling, 2013)."""

    def loss(step: int, generator: torch.Generator) -> Tensor:
        clean = fade(pictures.batch(*draw_indices(len(pictures), batch, generator)).to(device), generator)
        posterior = vae.encode(add_pixel_noise(clean, generator) * 2 - 1).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        difference = (vae.decode(posterior.mean + posterior.std * noise).sample + 1) / 2 - clean
        kl = posterior.kl().sum() / clean.numel()
        return difference.square().mean() + 0.05 * difference.abs().mean() + KL_WEIGHT * kl

    return loss


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Pictures, device: torch.device, batch: int = 128) -> Tensor:
    """Encode every picture and its mirror image.

    Returns:
        (2, N, 2, 4, h, w) fp16: plain and mirrored; posterior means and standard deviations, unscaled.
    """
    latents = []
    for mirror in (False, True):
        rows = []
        for start in range(0, len(pictures), batch):
            indices = torch.arange(start, min(start + batch, len(pictures)))
            images = pictures.batch(indices, torch.full((len(indices),), mirror)).to(device)
            posterior = vae.encode(images * 2 - 1).latent_dist
            rows.append(torch.stack([posterior.mean, posterior.std], 1).half().cpu())
        latents.append(torch.cat(rows))
    return torch.stack(latents)


def denoising_loss(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    subjects: list[Subject],
    scaling_factor: float,
    alphas_cumprod: Tensor,
    batch: int,
    device: torch.device,
) -> LossFunction:
    """The simple loss of DDPM (Ho et al. 2020, eq. 14) in latent space, with captions that leave words out at random."""

    def loss(step: int, generator: torch.Generator) -> Tensor:
        indices, mirrored = draw_indices(len(subjects), batch, generator)
        mean, std = latents[mirrored.long(), indices].float().to(device).unbind(1)
        x_0 = scaling_factor * (mean + std * torch.randn(mean.shape, generator=generator).to(device))
        captions = [draw_caption(subjects[i], generator) for i in indices.tolist()]
        # Stratified over the batch: each draw is uniform and the loss varies less from step to step.
        u = (torch.rand(1, generator=generator) + torch.arange(batch) / batch) % 1
        t = (u * len(alphas_cumprod)).long().to(device)
        eps = torch.randn(x_0.shape, generator=generator).to(device)
        alpha_t, sigma_t = alphas_cumprod[t].sqrt(), (1 - alphas_cumprod[t]).sqrt()
        x_t = alpha_t[:, None, None, None] * x_0 + sigma_t[:, None, None, None] * eps
        embeddings = text_encoder(tokenize(tokenizer, captions).to(device))[0]
        predicted = unet(x_t.to(memory_format=torch.channels_last), t, embeddings).sample
        return (predicted - eps).square().mean()

    return loss


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Return (B, model_max_length) token ids, padded."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def clip_loss(
    clip: CLIPModel, tokenizer: CLIPTokenizer, pictures: Pictures, batch: int, device: torch.device
) -> LossFunction:
    """CLIP's symmetric contrastive loss (Radford et al. 2021) in which every true (picture, caption) pair is a positive.

    In a closed world a batch holds many captions that are true of the same picture ("a duck" of a green one); counting
    them as negatives would teach falsehoods. Rows and columns of the target are normalised to sum to one.
    """

    def loss(step: int, generator: torch.Generator) -> Tensor:
        indices, mirrored = draw_indices(len(pictures), batch, generator)
        images = pictures.batch(indices, mirrored).to(device)
        if step % 2:
            images = fade(images, generator)
        images = add_pixel_noise(images, generator)
        shown = [pictures.subjects[i] for i in indices.tolist()]
        has_color, has_view = torch.rand(2, batch, generator=generator) < torch.tensor([[0.85], [0.4]])
        captions = [(s.name, s.color if c else None, s.view if v else None) for s, c, v in zip(shown, has_color, has_view, strict=True)]
        true = torch.tensor([
            [name == s.name and color in (None, s.color) and view in (None, s.view) for name, color, view in captions] for s in shown
        ]).float().to(device)  # fmt: skip
        texts = [write_caption(*c) for c in captions]
        output = clip(input_ids=tokenize(tokenizer, texts).to(device), pixel_values=images * 2 - 1)
        by_image = F.cross_entropy(output.logits_per_image, true / true.sum(1, keepdim=True))
        by_text = F.cross_entropy(output.logits_per_text, (true / true.sum(0)).T)
        return (by_image + by_text) / 2

    return loss
