"""What CLIP is asked about pictures: the prompt, the texts that distract from it, and the poses of the views."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from dist_vsd.priors.embedded.captions import caption
from dist_vsd.priors.embedded.scenes import COLORS, OBJECTS, WITH_A_FRONT
from dist_vsd.view_words import VIEW_WORDS


@dataclasses.dataclass(frozen=True)
class Words:
    """A caption of the embedded prior's closed language.

    Attributes:
        name: of the object.
        color: of the object, or None where the caption leaves it open.
        view: view words, or None.
    """

    name: str
    color: str | None = None
    view: str | None = None

    @property
    def text(self) -> str:
        """The caption."""
        return caption(self.name, self.color, self.view)


@functools.cache
def _all_words() -> dict[str, Words]:
    every = [Words(name, color, view) for name in OBJECTS for color in (None, *COLORS) for view in (None, *VIEW_WORDS)]
    return {words.text: words for words in every}


def read_caption(prompt: str) -> Words | None:
    """Return what a prompt says if it is a caption of the embedded prior's language, word for word."""
    return _all_words().get(prompt)


def captions_like(words: Words) -> list[str]:
    """Return the captions of the same form: of all objects, in all colours if these words name one, with their view words."""
    colors = COLORS if words.color else (None,)
    return [caption(name, color, words.view) for name in OBJECTS for color in colors]


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked about the views of particles.

    Attributes:
        prompt: what they should show.
        candidates: texts, the prompt among them, of which the nearest to a view is found; the prompt alone if nothing distracts.
        words: the prompt in the embedded prior's language; None for another prior or another prompt.
        view_words: of each of the V views of a particle; empty for pictures without a pose.
        num_azimuths: A, of which each elevation has as many, evenly spaced; 0 for pictures without a pose.
    """

    prompt: str
    candidates: tuple[str, ...]
    words: Words | None = None
    view_words: tuple[str, ...] = ()
    num_azimuths: int = 0

    @property
    def has_front(self) -> bool:
        """Whether the views have poses and the object, as far as is known, looks different from the front and from behind."""
        return self.num_azimuths > 0 and (self.words is None or self.words.name in WITH_A_FRONT)

    @property
    def view_texts(self) -> list[str]:
        """The prompt with each of VIEW_WORDS, in place of its own if it has some."""
        plain = self.prompt if self.words is None else caption(self.words.name, self.words.color)
        return [f"{plain}, {words}" for words in VIEW_WORDS]


def ask(prompt: str, others: Sequence[str], in_embedded_language: bool, view_words: Sequence[str] = (), num_azimuths: int = 0) -> Question:
    """Make the question for a prompt.

    Args:
        prompt: what the particles should show.
        others: prompts that distract from it; where there are none, the captions of the same form of the embedded language.
        in_embedded_language: whether the prior is the embedded one.
        view_words: see Question.
        num_azimuths: see Question.
    """
    words = read_caption(prompt) if in_embedded_language else None
    others = others or (captions_like(words) if words else ())
    candidates = tuple(dict.fromkeys([prompt, *others]))
    return Question(prompt, candidates, words, tuple(view_words), num_azimuths)
