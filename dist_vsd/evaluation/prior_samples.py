"""The prior's own samples at a run's prompt: what its particles are compared with."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from dist_vsd.priors.sampling import sample_images
from dist_vsd.priors.table import load_prior, prior_row

SAMPLES_AT_ONCE = 32


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
        self._prior = functools.lru_cache(maxsize=1)(lambda name: load_prior(name, device))
        self._drawn = functools.lru_cache(maxsize=4)(self._draw)

    def of(self, prior: str, prompt: str, view_words: Sequence[str]) -> Tensor:
        """Return (num_samples, 3, H, W) pictures in [0, 1].

        Args:
            prior: its name.
            prompt: of the run.
            view_words: that follow the prompt, in turn; none: the prompt alone. A prior that knows cameras is told them instead, and
                draws views around the object.
        """
        view_words = () if prior_row(prior).views_per_shot > 1 else view_words
        texts = [f"{prompt}, {words}" for words in view_words] or [prompt]
        return self._drawn(prior, tuple(texts[i * len(texts) // self.num_samples % len(texts)] for i in range(self.num_samples)))

    def _draw(self, prior: str, prompts: tuple[str, ...]) -> Tensor:
        pretrained = self._prior(prior)
        num_views, sampler = pretrained.views_per_shot, pretrained.process.samplers[-1]
        asked, at_once, drawn = prompts[::num_views], SAMPLES_AT_ONCE // num_views, []
        for first in range(0, len(asked), at_once):
            chunk = list(asked[first : first + at_once])
            seeds = range(first, first + len(chunk))
            drawn.append(sample_images(pretrained, chunk, self.num_steps, self.guidance_scale, seeds, sampler))
        return torch.cat(drawn)[: len(prompts)]
