"""Whether a prior can read a prompt, told by its tokenizers alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dist_vsd.priors.pipeline_files import read_json
from dist_vsd.priors.pipeline_folder import PipelineFolder, check_vocabulary

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

SPECIAL_TOKENS = 2  # begin and end of text
SHORT = 14  # bytes that every text encoder takes, the embedded one (16 tokens) among them


def check_prompts(prompts: Sequence[str], folder: PipelineFolder) -> None:
    """Refuse prompts with words that a prior does not know, or with more tokens than its text encoders take: nothing is cut silently.

    Args:
        prompts: everything that will be embedded: with view words, negative ones.
        folder: of the prior.

    Raises:
        ValueError: naming the unknown words; or how many tokens there are, how many fit, and what would be cut off.
    """
    check_vocabulary(list(prompts), folder)
    if all(len(prompt.encode()) <= SHORT for prompt in prompts):  # a token is a byte at least; loading a tokenizer takes a second
        return
    for _, tokenizer, max_tokens in load_tokenizers(folder):
        for prompt in prompts:
            read = tokenizer(prompt, return_offsets_mapping=True, verbose=False)
            count, fits = len(read.input_ids) - SPECIAL_TOKENS, max_tokens - SPECIAL_TOKENS
            if count > fits:
                first_cut = read.offset_mapping[1 + fits][0]
                raise ValueError(
                    f"a prompt of {count} tokens is too long, the text encoder takes {fits}: shorten {_short(prompt)!r}, of which "
                    f"{_short(prompt[first_cut:])!r} would be cut off"
                )


def load_tokenizers(folder: PipelineFolder) -> list[tuple[str, CLIPTokenizer, int]]:
    """Return of each text encoder its name, its tokenizer, and how many tokens it takes, begin and end of text among them.

    Raises:
        ValueError: a tokenizer can't be loaded.
    """
    return [(encoder, *_load_tokenizer(folder.path, encoder, tokenizer)) for encoder, tokenizer in folder.text_encoders]


@functools.lru_cache(maxsize=8)  # a sweep checks thousands of prompts
def _load_tokenizer(path: Path, encoder: str, name: str) -> tuple[CLIPTokenizer, int]:
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(path / name, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"prior {str(path)!r} is damaged: its {name} can't be loaded ({reason}); copy it anew") from error
    config = read_json(path / encoder / "config.json", str(path))
    return tokenizer, min(tokenizer.model_max_length, config.get("max_position_embeddings", 77))


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."
