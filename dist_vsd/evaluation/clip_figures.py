"""Figures by CLIP over all particles, from sums over particles: the same while a run goes, over ranks, and afterwards.

clip/score: mean cosine of views and prompt. clip/r_precision: share of views to which the prompt is the nearest of the candidates.
clip/quality_bits and variety_bits: see distributions.quality_bits. particles/diversity: 1 - the mean cosine between two particles from
the same camera. particles/multi_face_rate: share of particles with more than one face (multi_face.py), of objects that have a front.
recognition/object, color, view: share of views recognised as showing the prompt's object, in its colour if it names one, and from where
the camera stands. Where the prompt leaves them open: recognition/color_bits and, for pictures without a pose, view_bits: how evenly the
recognised ones are spread over all views.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dist_vsd.evaluation.distributions import entropy_bits, entropy_of_counts_bits
from dist_vsd.evaluation.judge import ClipJudge, Verdict
from dist_vsd.evaluation.question import Question
from dist_vsd.priors.embedded.scenes import COLORS, OBJECTS
from dist_vsd.view_words import VIEW_WORDS


@dataclasses.dataclass(frozen=True)
class ClipSums:
    """Sums over particles, from which every figure follows; their size does not grow with the number of particles.

    Attributes:
        similarity: () cosines of all views with the prompt.
        hits: () views to which the prompt is the nearest candidate.
        entropy: () bits of the predictions of all views.
        right_views: () views recognised as taken from where the camera stands.
        multi_faced: () particles with more than one face.
        embedding: (V, D) unit vectors of the particles, by view.
        prediction: (C,) probabilities of the candidates, over all views.
        views: (4,) how often each of VIEW_WORDS was recognised.
        pairs: (num_pairs,) how often each (object, colour) was recognised.
    """

    similarity: Tensor
    hits: Tensor
    entropy: Tensor
    right_views: Tensor
    multi_faced: Tensor
    embedding: Tensor
    prediction: Tensor
    views: Tensor
    pairs: Tensor

    @staticmethod
    def zeros(num_views: int, width: int, num_candidates: int, num_pairs: int, device: torch.device | str = "cpu") -> ClipSums:
        """Return the sums over no particle."""
        shapes = [(), (), (), (), (), (num_views, width), (num_candidates,), (len(VIEW_WORDS),), (num_pairs,)]
        return ClipSums(*(torch.zeros(shape, device=device) for shape in shapes))

    @staticmethod
    def of(verdict: Verdict, num_pairs: int) -> ClipSums:
        """Sum a verdict over its particles.

        Args:
            verdict: on P particles from the same V cameras.
            num_pairs: that were told apart; 0 if none were.
        """
        kind = verdict.embedding
        return ClipSums(
            similarity=verdict.similarity.sum(),
            hits=verdict.is_hit.sum().to(kind),
            entropy=entropy_bits(verdict.prediction).sum(),
            right_views=verdict.is_right_view.sum().to(kind),
            multi_faced=(verdict.num_faces > 1).sum().to(kind),
            embedding=verdict.embedding.sum(0),
            prediction=verdict.prediction.sum((0, 1)),
            views=torch.bincount(verdict.view.flatten(), minlength=len(VIEW_WORDS)).to(kind),
            pairs=torch.bincount(verdict.pair.flatten(), minlength=num_pairs).to(kind),
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All sums, in the order of the fields; may be changed in place."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    @property
    def objects(self) -> Tensor:
        """(num_objects,) how often each was recognised; see colors."""
        return self.pairs.view(len(OBJECTS), len(COLORS)).sum(1)

    @property
    def colors(self) -> Tensor:
        """(num_colors,) how often each was recognised; only where pairs were told apart."""
        return self.pairs.view(len(OBJECTS), len(COLORS)).sum(0)


def sums_of(judge: ClipJudge, pictures: Tensor) -> ClipSums:
    """Judge (P, V, 3, H, W) pictures and sum over them."""
    return ClipSums.of(judge(pictures), judge.num_pairs)


def clip_score(sums: ClipSums, num_particles: int) -> float:
    """Return the mean cosine of views and prompt (CLIPScore without its factor 2.5; Hessel et al. 2021)."""
    return float(sums.similarity) / (num_particles * len(sums.embedding))


def r_precision(sums: ClipSums, num_particles: int) -> float:
    """Return the share of views to which the prompt is the nearest candidate (CLIP R-precision; Park et al. 2021)."""
    return float(sums.hits) / (num_particles * len(sums.embedding))


def diversity(embedding: Tensor, num_particles: int) -> float:
    """Return 1 - the mean cosine between two particles from the same camera: 0 for copies of one another.

    For unit vectors the sum over ordered pairs of different particles is ||sum||^2 - n, so the sum over particles is enough.

    Args:
        embedding: (V, D) sums over all particles, by view.
        num_particles: n, at least 2.
    """
    pairs = num_particles * (num_particles - 1)
    return float(1.0 - (embedding.double().square().sum(1) - num_particles).mean() / pairs)


def figures_of(sums: ClipSums, num_particles: int, question: Question) -> dict[str, float]:
    """Return the figures by name, those that the question has an answer to; see the module.

    Args:
        sums: over all particles.
        num_particles: that were summed over.
        question: that was judged.
    """
    num_pictures = num_particles * len(sums.embedding)
    figures = {"clip/score": clip_score(sums, num_particles)}
    if len(question.candidates) > 1:
        figures["clip/r_precision"] = r_precision(sums, num_particles)
        figures["clip/quality_bits"] = float(sums.entropy) / num_pictures
        figures["clip/variety_bits"] = float(entropy_bits(sums.prediction / num_pictures))
    if num_particles > 1:
        figures["particles/diversity"] = diversity(sums.embedding, num_particles)
    if question.has_front:
        figures["particles/multi_face_rate"] = float(sums.multi_faced) / num_particles
        figures["recognition/view"] = float(sums.right_views) / num_pictures
    if question.words:
        figures |= _figures_of_words(sums, num_pictures, question)
    return figures


def _figures_of_words(sums: ClipSums, num_pictures: int, question: Question) -> dict[str, float]:
    words = question.words
    assert words is not None
    figures = {"recognition/object": float(sums.objects[list(OBJECTS).index(words.name)]) / num_pictures}
    if words.color:
        figures["recognition/color"] = float(sums.colors[list(COLORS).index(words.color)]) / num_pictures
    else:
        figures["recognition/color_bits"] = entropy_of_counts_bits(sums.colors)
    if not question.num_azimuths and not words.view:
        figures["recognition/view_bits"] = entropy_of_counts_bits(sums.views)
    return figures
