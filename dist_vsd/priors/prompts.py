"""Whether a prior can read a prompt, told by its tokenizers alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dist_vsd.priors.pipeline_files import read_json
from dist_vsd.priors.pipeline_folder import PipelineFolder, check_vocabulary
from dist_vsd.priors.pipeline_kinds import FLOWS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
            num_special = tokenizer.num_special_tokens_to_add()  # begin and end of text, or one of them
            count, fits = len(read.input_ids) - num_special, max_tokens - num_special
            if count > fits:
                of_text = [span for span in read.offset_mapping if span[1] > span[0]]
                first_cut = of_text[fits][0]
                raise ValueError(
                    f"a prompt of {count} tokens is too long, the text encoder takes {fits}: shorten {_short(prompt)!r}, of which "
                    f"{_short(prompt[first_cut:])!r} would be cut off"
                )


def load_tokenizers(folder: PipelineFolder) -> list[tuple[str, PreTrainedTokenizerBase, int]]:
    """Return of each text encoder its name, its tokenizer, and how many tokens it takes, begin and end of text among them.

    Raises:
        ValueError: a tokenizer can't be loaded.
    """
    classes = folder.encoder_classes if folder.kind in FLOWS else {}
    longest = {name: folder.num_long_tokens for name in classes if "CLIP" not in classes[name]}
    wanted = [pair for pair in folder.text_encoders if longest.get(pair[0], 1)]  # a T5 whose tokens nobody reads is left alone
    return [(encoder, *_load_tokenizer(folder.path, encoder, tokenizer, longest.get(encoder, 0))) for encoder, tokenizer in wanted]


@functools.lru_cache(maxsize=8)  # a sweep checks thousands of prompts
def _load_tokenizer(path: Path, encoder: str, name: str, num_tokens: int) -> tuple[PreTrainedTokenizerBase, int]:
    """Return a tokenizer, CLIP's where no number of tokens is given, and that number, or CLIP's own."""
    from transformers import AutoTokenizer, CLIPTokenizer

    try:
        kind = AutoTokenizer if num_tokens else CLIPTokenizer
        tokenizer = kind.from_pretrained(path / name, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"prior {str(path)!r} is damaged: its {name} can't be loaded ({reason}); copy it anew") from error
    config = read_json(path / encoder / "config.json", str(path))
    return tokenizer, num_tokens or min(tokenizer.model_max_length, config.get("max_position_embeddings", 77))


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."
