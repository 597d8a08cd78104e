"""CLIP's verdict on pictures: how well each fits the prompt, and which text, view, object and colour it recognises in each."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dist_vsd.evaluation.multi_face import num_faces
from dist_vsd.evaluation.question import Question
from dist_vsd.priors.clip import ClipScorer
from dist_vsd.priors.embedded.captions import all_pairs, caption
from dist_vsd.view_words import VIEW_WORDS

PICTURES_AT_ONCE = 128
FRONT_SIDE_BACK = [VIEW_WORDS.index(words) for words in ("front view", "side view", "back view")]
# Azimuths nearer than this are averaged before faces are counted: an odd view at a boundary is no face.
SMOOTHING_DEG = 15.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What CLIP says of P particles from V views each.

    Attributes:
        embedding: (P, V, D) unit vectors.
        similarity: (P, V) cosines with the prompt.
        prediction: (P, V, C) probabilities of the question's candidates: the softmax of the cosines times the CLIP's own scale.
        is_hit: (P, V) whether the prompt is the nearest candidate.
        view: (P, V) index of the view words, among VIEW_WORDS, that fit best after the prompt.
        is_right_view: (P, V) whether these are the camera's; empty, (P, 0), without poses or for an object without a front.
        pair: (P, V) index of the (object, colour) that fits best, among all_pairs(); empty, (P, 0), for unknown words.
        num_faces: (P,) see multi_face; empty, (0,), as is_right_view.
    """

    embedding: Tensor
    similarity: Tensor
    prediction: Tensor
    is_hit: Tensor
    view: Tensor
    is_right_view: Tensor
    pair: Tensor
    num_faces: Tensor


class ClipJudge:
    """A CLIP with a question about pictures, whose texts are embedded once.

    Args:
        scorer: the CLIP.
        question: what it is asked.
    """

    def __init__(self, scorer: ClipScorer, question: Question) -> None:
        self.scorer, self.question = scorer, question
        pairs = [caption(*pair) for pair in all_pairs()] if question.words else []
        texts = [*question.candidates, *question.view_texts, *pairs]
        self._texts = scorer.embed_texts(texts)
        self._sizes = [len(question.candidates), len(VIEW_WORDS), len(pairs)]
        self.num_pairs, self.width = len(pairs), self._texts.shape[1]

    @torch.no_grad()
    def embed(self, pictures: Tensor) -> Tensor:
        """Return (..., D) unit vectors of (..., 3, H, W) pictures in [0, 1]."""
        flat = pictures.flatten(0, -4)
        rows = [self.scorer.embed_images(chunk.to(self._texts.device)) for chunk in flat.split(PICTURES_AT_ONCE)]
        return torch.cat(rows).unflatten(0, pictures.shape[:-3])

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Verdict:
        """Judge (P, V, 3, H, W) pictures in [0, 1]."""
        question, embedding = self.question, self.embed(pictures)
        cosines, view_cosines, pair_cosines = (embedding @ self._texts.T).split(self._sizes, -1)
        view = view_cosines.argmax(-1)
        none = view[:, :0]
        is_right_view, faces = none.bool(), none.new_zeros(0)
        if question.has_front:
            right = torch.tensor([VIEW_WORDS.index(words) for words in question.view_words], device=view.device)
            is_right_view = view == right
            half_width = int(SMOOTHING_DEG / 360.0 * question.num_azimuths)
            faces = num_faces(view_cosines[..., FRONT_SIDE_BACK], question.num_azimuths, half_width)
        return Verdict(
            embedding=embedding,
            similarity=cosines[..., 0],  # the prompt is the first of its candidates
            prediction=(cosines * self.scorer.model.logit_scale.exp()).softmax(-1),
            is_hit=cosines.argmax(-1) == 0,
            view=view,
            is_right_view=is_right_view,
            pair=pair_cosines.argmax(-1) if self.num_pairs else none,
            num_faces=faces,
        )
