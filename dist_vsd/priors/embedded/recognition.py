"""Which object in which colour does a picture show? The embedded CLIP's word on it, among all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vsd.priors.clip import ClipScorer
from dist_vsd.priors.embedded.captions import all_pairs, caption


@torch.no_grad()
def recognize(scorer: ClipScorer, images: Tensor, batch: int = 128) -> list[tuple[str, str]]:
    """Return the (object, colour) pair whose caption fits each of (B, 3, H, W) pictures best."""
    pairs = all_pairs()
    texts = scorer.embed_texts([caption(*pair) for pair in pairs])
    best = torch.cat([(scorer.embed_images(chunk) @ texts.T).argmax(-1).cpu() for chunk in images.split(batch)])
    return [pairs[i] for i in best.tolist()]


def r_precision(scorer: ClipScorer, images: Tensor, shown: list[tuple[str, str]]) -> float:
    """Return the share of pictures that are recognised as the (object, colour) that they should show."""
    return sum(a == b for a, b in zip(recognize(scorer, images), shown, strict=True)) / len(shown)
