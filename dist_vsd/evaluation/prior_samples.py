"""The prior's own samples at a run's prompt: what its particles are compared with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from dist_vsd.priors.flow_config import FlowConfig
from dist_vsd.priors.sampling import sample_latents
from dist_vsd.priors.table import load_prior, prior_row

SAMPLES_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Samples:
    """N samples of a prior.

    Attributes:
        pictures: (N, 3, H, W) in [0, 1].
        latents: (N, ...) x_0, of which these are decoded.
    """

    pictures: Tensor
    latents: Tensor


class PriorSamples:
    """Draws samples, the same for the same prompt, and keeps those of the last few prompts.

    Args:
        num_samples: for each prompt.
        guidance_scale: s, the same for all runs, whatever theirs.
        num_steps: of DPM-Solver++, or of the sampler that the prior's process has for few steps.
        device: to draw on.
    """

    def __init__(self, num_samples: int = 64, guidance_scale: float = 7.5, num_steps: int = 20, device: torch.device | str = "cpu") -> None:
        self.num_samples, self.guidance_scale, self.num_steps, self.device = num_samples, guidance_scale, num_steps, device
        self._prior = functools.lru_cache(maxsize=1)(lambda name, flow: load_prior(name, device, flow=flow))
        self._drawn = functools.lru_cache(maxsize=4)(self._draw)

    def of(self, prior: str, prompt: str, view_words: Sequence[str], flow: FlowConfig | None = None) -> Samples:
        """Return the samples for a prompt.

        Args:
            prior: its name.
            prompt: of the run.
            view_words: that follow the prompt, in turn; none: the prompt alone. A prior that knows cameras is told them instead, and
                draws views around the object.
            flow: what the run asks of a prior that is a rectified flow.
        """
        count, num_views = self.num_samples, prior_row(prior).views_per_shot
        if num_views > 1:
            count, view_words = -(-count // num_views), ()
        texts = [f"{prompt}, {words}" for words in view_words] or [prompt]
        return self._drawn(prior, flow, tuple(texts[i * len(texts) // count % len(texts)] for i in range(count)))

    def _draw(self, name: str, flow: FlowConfig | None, prompts: tuple[str, ...]) -> Samples:
        prior, latents, pictures = self._prior(name, flow), [], []
        for i in range(0, len(prompts), SAMPLES_AT_ONCE):
            some = list(prompts[i : i + SAMPLES_AT_ONCE])
            seeds = range(i, i + len(some))
            latents.append(sample_latents(prior, some, self.num_steps, self.guidance_scale, seeds, prior.process.samplers[-1]))
            with torch.no_grad():
                pictures.append(prior.decode(latents[-1]).cpu())
        return Samples(torch.cat(pictures)[: self.num_samples], torch.cat(latents)[: self.num_samples].cpu())
