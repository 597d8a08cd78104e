"""The closed language of the embedded prior: its captions, its vocabulary and its tokenizer.

A caption reads "a green duck, side view". Captions drawn for training leave words out at random, so that the prior
also knows "a duck", "a green duck" and nothing at all (the unconditional branch of classifier-free guidance).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from dist_vsd.priors.embedded.scenes import COLORS, OBJECTS
from dist_vsd.view_words import VIEW_WORDS, view_words

DROP_ALL, DROP_VIEW, DROP_COLOR = 0.10, 0.15, 0.20
MAX_TOKENS = 16
NORMAL_MAP = "normal map"
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a picture shows: one object in one colour from one direction (degrees)."""

    name: str
    color: str
    azimuth_deg: float
    elevation_deg: float

    @property
    def view(self) -> str:
        """The view words of the picture."""
        return view_words(self.azimuth_deg, self.elevation_deg)


def article(word: str) -> str:
    """Return "an" before a vowel, "a" otherwise."""
    return "an" if word[0] in "aeiou" else "a"


def caption(name: str, color: str | None = None, view: str | None = None, medium: str | None = None) -> str:
    """Write "a green duck, side view", with ", normal map" as medium; all but the name may be left out."""
    words = f"{article(color or name)} {f'{color} ' if color else ''}{name}"
    return ", ".join([words, *(more for more in (view, medium) if more)])


def draw_caption(subject: Subject, generator: torch.Generator) -> str:
    """Caption a subject, leaving out everything, the view or the colour with the module's probabilities."""
    drop_all, drop_view, drop_color = (torch.rand(3, generator=generator) < torch.tensor([DROP_ALL, DROP_VIEW, DROP_COLOR])).tolist()
    if drop_all:
        return ""
    return caption(subject.name, None if drop_color else subject.color, None if drop_view else subject.view)


def all_pairs() -> list[tuple[str, str]]:
    """Return every (object, colour) pair, objects first."""
    return [(name, color) for name in OBJECTS for color in COLORS]


def vocabulary(more: str = "") -> list[str]:
    """Return the words that the embedded prior knows, objects, colours, articles and view words, and those of ``more``."""
    views = sorted({word for words in VIEW_WORDS for word in words.split()})
    return [*OBJECTS, *COLORS, "a", "an", "the", *views, *more.split()]


def write_tokenizer(folder: Path, more: str = "") -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json of a CLIPTokenizer in which each word of vocabulary() is one token.

    Byte-pair merges are found word by word: the merges so far are applied to the next word, and what is left in pieces
    is joined from the left by new merges. New merges rank below older ones, so they never change an earlier word.
    """
    words, merges = vocabulary(more), list[tuple[str, str]]()
    for word in words:
        pieces = _apply_merges([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _apply_merges(pieces, merges)
    letters = sorted({letter for word in words for letter in word} | {","})
    symbols = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    (folder / "vocab.json").write_text(json.dumps(vocab, indent=0) + "\n")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "do_lower_case": True}
    settings |= {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _apply_merges(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(zip(pieces, pieces[1:], strict=False)) if pair in ranks]
        if not pairs:
            return pieces
        _, i = min(pairs)
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]
