"""What score distillation asks of a frozen diffusion model, latent or not."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from dist_vsd.diffusion.schedule import NoiseSchedule, classifier_free_guidance


@dataclasses.dataclass(frozen=True)
class TextEmbeddings:
    """A prompt as the denoiser reads it: (B, num_tokens, width) each.

    Attributes:
        cond: of the prompts.
        uncond: of the empty (or negative) prompt, once for each.
    """

    cond: Tensor
    uncond: Tensor

    def __getitem__(self, index: slice | Tensor | list[int]) -> TextEmbeddings:
        """Return the rows of an index."""
        return TextEmbeddings(self.cond[index], self.uncond[index])


class Prior(Protocol):
    """A frozen text-to-image diffusion model p_t(x_t | y).

    Attributes:
        schedule: its noise schedule.
        image_size: height and width of the images that encode() wants, pixels; renders of another size are resized.
    """

    schedule: NoiseSchedule
    image_size: int

    def encode(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) images in [0, 1] to x_0; the gradient flows to the image."""
        ...

    def decode(self, x_0: Tensor) -> Tensor:
        """Map x_0 to (B, 3, H, W) images in [0, 1]."""
        ...

    def eps(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise in x_t.

        Args:
            x_t: (B, ...) noised samples.
            t: (B,) integer timesteps.
            y: (B, num_tokens, width) embeddings.
        """
        ...


def eps_pretrain(prior: Prior, x_t: Tensor, t: Tensor, y: TextEmbeddings, guidance_scale: float) -> Tensor:
    """Predict the noise with classifier-free guidance, in one batched call of the network (Ho and Salimans 2022).

    Args:
        prior: the frozen model.
        x_t: (B, ...) noised samples.
        t: (B,) integer timesteps.
        y: embeddings of B prompts.
        guidance_scale: s; at 1 the unconditional branch is not evaluated.

    Returns:
        eps_pretrain(x_t; y, s), like x_t. No gradient flows.
    """
    with torch.no_grad():
        if guidance_scale == 1.0:
            return prior.eps(x_t, t, y.cond)
        both = prior.eps(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y.uncond, y.cond]))
        eps_uncond, eps_cond = both.chunk(2)
        return classifier_free_guidance(eps_uncond, eps_cond, guidance_scale)
