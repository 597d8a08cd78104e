"""Texts as the transformers of rectified flows read them: by CLIP, T5 and Gemma, the long encoders in bf16, each freed after its turn."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad

from dist_vsd.priors.networks import load_network
from dist_vsd.priors.pipeline_kinds import SANA, STABLE_DIFFUSION_3, PipelineFolder
from dist_vsd.priors.prompts import load_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPARE_BYTES = 2**29  # what an encoder of some hundred tokens holds beside its weights
Rows = list[dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Negative:
    """A text of the unconditional branch, which SANA reads without its instruction."""

    words: str


def encode_for_flow(folder: PipelineFolder, texts: Sequence[str | Negative], device: torch.device | str) -> Rows:
    """Encode texts one by one with a flow's text encoders.

    Stable Diffusion 3: the states of both CLIPs before their last layer, side by side and widened by zeros, then T5's tokens (zeros where
    the folder has no T5 and does not say that none are read); the projected embeddings of both CLIPs as ``pooled``. FLUX: T5's tokens,
    and CLIP's plain embedding as ``pooled``. SANA: Gemma's tokens of its instruction and the prompt, the first of them and the last ones,
    with a ``mask`` of what is padding.

    Args:
        folder: of the prior.
        texts: to encode.
        device: to compute on.

    Returns:
        For each text its (num_tokens, width) "tokens", and "pooled" (pooled_width,) or "mask" (num_tokens,), in fp32 on the CPU.

    Raises:
        ValueError: an encoder can't be loaded.
    """
    if folder.kind == SANA:
        return _by_gemma(folder, texts, device)
    words = [text.words if isinstance(text, Negative) else text for text in texts]
    states: list[dict[str, Tensor]] = [{} for _ in texts]
    pooled: list[list[Tensor]] = [[] for _ in texts]
    for component, tokenizer, max_tokens in load_tokenizers(folder):
        is_clip = "CLIP" in folder.encoder_classes[component]
        encoder = _load(folder, component, torch.float32 if is_clip else torch.bfloat16, device)
        for i, text in enumerate(words):
            output = _asked(encoder, _read(tokenizer, text, max_tokens), output_hidden_states=is_clip)
            if is_clip:
                whole = output.text_embeds if folder.kind == STABLE_DIFFUSION_3 else output.pooler_output
                pooled[i].append(whole[0].float().cpu())
            states[i][component] = (output.hidden_states[-2] if is_clip else output.last_hidden_state)[0].float().cpu()
        del encoder  # before the next one is loaded: T5 takes 10 GB
    join = _of_stable_diffusion_3 if folder.kind == STABLE_DIFFUSION_3 else _of_flux
    return [{"tokens": join(folder, state), "pooled": torch.cat(whole)} for state, whole in zip(states, pooled, strict=True)]


def _of_stable_diffusion_3(folder: PipelineFolder, states: dict[str, Tensor]) -> Tensor:
    width, num_long = folder.config("transformer")["joint_attention_dim"], folder.num_long_tokens
    clip = torch.cat([state for component, state in states.items() if component != "text_encoder_3"], -1)
    clip = pad(clip, (0, width - clip.shape[1]))
    return torch.cat([clip, states.get("text_encoder_3", torch.zeros(num_long, width))])


def _of_flux(_folder: PipelineFolder, states: dict[str, Tensor]) -> Tensor:
    return states["text_encoder_2"]


def _by_gemma(folder: PipelineFolder, texts: Sequence[str | Negative], device: torch.device | str) -> Rows:
    """Encode as section 2.3 of SANA (Xie et al. 2024) has it: a prompt behind an instruction to enhance it, lower case."""
    ((component, tokenizer, num_tokens),) = load_tokenizers(folder)
    tokenizer.padding_side = "right"
    instruction = _instruction()
    beside = len(tokenizer(instruction).input_ids) - 2  # tokens of it that are not handed on
    encoder, rows = _load(folder, component, torch.bfloat16, device), []
    for text in texts:
        is_plain = isinstance(text, Negative)
        words = (text.words if isinstance(text, Negative) else text).lower().strip()
        longest = num_tokens if is_plain else num_tokens + beside
        read = _read(tokenizer, words if is_plain else instruction + words, longest)
        tokens = _asked(encoder, read, "attention_mask").last_hidden_state[0].float().cpu()
        mask = read["attention_mask"][0].float().cpu()
        kept = [0, *range(longest - num_tokens + 1, longest)]
        rows.append({"tokens": tokens[kept].contiguous(), "mask": mask[kept].contiguous()})
    return rows


def _instruction() -> str:
    """Return what SANA's pipeline puts before a prompt by default."""
    from diffusers import SanaPipeline

    return "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)


def _load(folder: PipelineFolder, component: str, dtype: torch.dtype, device: torch.device | str) -> Any:
    encoder = load_network(getattr(transformers, folder.encoder_classes[component]), folder, component, dtype)
    return encoder.to(place_for(sum(p.numel() * p.element_size() for p in encoder.parameters()), device))


def place_for(num_bytes: int, device: torch.device | str) -> torch.device:
    """Return where a text encoder of so many bytes computes: on the device, or where a GPU lacks the room, on the CPU, which is said.

    T5 takes 9.5 GB, for some seconds, beside a transformer that stays: more than a card may have that trains with it.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return device
    free, _total = torch.cuda.mem_get_info(device)
    if free > num_bytes + SPARE_BYTES:
        return device
    if os.environ.get("RANK", "0") == "0":
        gib = num_bytes / 2**30
        print(f"a text encoder of {gib:.1f} GiB has no room on the GPU: texts are embedded on the CPU, once", file=sys.stderr, flush=True)
    return torch.device("cpu")


def _read(tokenizer: PreTrainedTokenizerBase, text: str, num_tokens: int) -> dict[str, Tensor]:
    return dict(tokenizer(text, padding="max_length", max_length=num_tokens, truncation=True, return_tensors="pt"))


@torch.no_grad()
def _asked(encoder: Any, read: dict[str, Tensor], *names: str, **options: Any) -> Any:
    """Ask an encoder, where it is, of tokens and of what else of the tokenizer's is named."""
    place = next(encoder.parameters()).device
    return encoder(read["input_ids"].to(place), **{name: read[name].to(place) for name in names}, **options)
