"""priors/embedded/captions.py: the closed language, its tokenizer, and the refusal of words that are not in it."""

import dataclasses
from collections import Counter

import pytest
import torch
from transformers import CLIPTokenizer

from dist_vsd.priors.embedded.captions import (
    DROP_ALL,
    DROP_COLOR,
    DROP_VIEW,
    MAX_TOKENS,
    Subject,
    all_pairs,
    article,
    caption,
    draw_caption,
    vocabulary,
    write_tokenizer,
)
from dist_vsd.priors.embedded.scenes import COLORS, OBJECTS
from dist_vsd.priors.pipeline_folder import PipelineFolder, check_vocabulary
from dist_vsd.view_words import VIEW_WORDS

DUCK = Subject("duck", "green", azimuth_deg=90.0, elevation_deg=0.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


@pytest.fixture
def closed(tmp_path):
    return PipelineFolder(tmp_path, {}, {"vocabulary": vocabulary()})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("duck", "green", "side view"), "a green duck, side view"),
        (("duck", "orange", None), "an orange duck"),
        (("duck", None, "overhead view"), "a duck, overhead view"),
        (("mug", None, None), "a mug"),
    ],
)
def test_captions_by_hand(words, expected):
    assert caption(*words) == expected


def test_the_article_is_an_before_a_vowel():
    assert [article(word) for word in ("orange", "red", "apple", "egg", "yellow")] == ["an", "a", "an", "an", "a"]


def test_a_subject_knows_the_words_of_its_view():
    assert DUCK.view == "side view"
    assert dataclasses.replace(DUCK, azimuth_deg=-170.0).view == "back view"
    assert dataclasses.replace(DUCK, elevation_deg=75.0).view == "overhead view"


def test_there_are_96_pairs_each_once():
    assert len(set(all_pairs())) == len(all_pairs()) == len(OBJECTS) * len(COLORS) == 96


def test_words_are_dropped_at_their_rates():
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(draw_caption(DUCK, generator) for _ in range(8000))
    keep = 1 - DROP_ALL
    expected = {
        "": DROP_ALL,
        "a green duck, side view": keep * (1 - DROP_VIEW) * (1 - DROP_COLOR),
        "a green duck": keep * DROP_VIEW * (1 - DROP_COLOR),
        "a duck, side view": keep * (1 - DROP_VIEW) * DROP_COLOR,
        "a duck": keep * DROP_VIEW * DROP_COLOR,
    }
    assert set(drawn) == set(expected)
    for words, share in expected.items():
        # Four standard deviations of a binomial share of 8,000.
        assert drawn[words] / 8000 == pytest.approx(share, abs=4 * (share * (1 - share) / 8000) ** 0.5), words
    assert (DROP_ALL, DROP_VIEW, DROP_COLOR) == (0.10, 0.15, 0.20)


def test_each_word_is_one_token_of_its_own(tokenizer):
    ids = {}
    for word in vocabulary():
        start, *middle, end = tokenizer(word).input_ids
        assert (start, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert len(middle) == 1, (word, tokenizer.convert_ids_to_tokens(middle))
        ids[word] = middle[0]
    assert len(set(ids.values())) == len(vocabulary()) == len(set(vocabulary()))


def test_each_word_stays_one_token_in_the_longest_caption_and_in_capitals(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("An Orange mushroom, OVERHEAD view").input_ids)
    expected = ["an", "orange", "mushroom", ",", "overhead", "view"]
    assert tokens == ["<|startoftext|>", *(word + "</w>" for word in expected), "<|endoftext|>"]


def test_every_caption_is_in_the_vocabulary_and_fits_the_text_encoder(tokenizer):
    captions = [caption(name, color, view) for name, color in all_pairs() for view in VIEW_WORDS]
    words = {word for text in captions for word in text.replace(",", "").split()}
    assert words <= set(vocabulary())
    assert max(map(len, tokenizer(captions).input_ids)) <= MAX_TOKENS
    padded = tokenizer(captions[:2], padding="max_length").input_ids
    assert [len(row) for row in padded] == [MAX_TOKENS] * 2


def test_different_captions_have_different_tokens(tokenizer):
    captions = [caption(name, color, view) for name, color in all_pairs() for view in (None, *VIEW_WORDS)]
    assert len({tuple(row) for row in tokenizer(captions).input_ids}) == len(captions)


@pytest.mark.parametrize("prompt", ["a green duck", "A Green DUCK, side view.", "", "the overhead  view , a chair"])
def test_known_words_pass_whatever_their_case_and_commas(closed, prompt):
    check_vocabulary([prompt], closed)


def test_unknown_words_are_refused_with_their_nearest_and_all_known_ones(closed):
    with pytest.raises(ValueError, match=r"does not know 'dragon', 'gren' \(did you mean .*green.*\?\).* ball cube cone") as refusal:
        check_vocabulary(["a dragon", "a gren duck"], closed)
    assert "'duck'" not in str(refusal.value)


def test_a_prior_without_a_closed_vocabulary_takes_any_word(tmp_path):
    check_vocabulary(["a DSLR photo of an ice cream sundae"], PipelineFolder(tmp_path, {}, {}))
