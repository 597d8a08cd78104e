"""Texts as denoisers read them: by one CLIP text encoder, XL's two, or a flow's. Each text is embedded once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
import transformers
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dist_vsd.priors.embedding_cache import file_digest, read_entry, write_entry
from dist_vsd.priors.flow_text import Negative, encode_for_flow
from dist_vsd.priors.networks import load_network
from dist_vsd.priors.pipeline_kinds import FLOWS, SANA, STABLE_DIFFUSION_XL, PipelineFolder
from dist_vsd.priors.prior import Text
from dist_vsd.priors.prompts import check_prompts, load_tokenizers

# Raised by every change of what _encode() makes of a text, so that older entries of the cache are left alone.
EMBEDDING_VERSION = 1
ENCODER_CLASSES = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


def embed_texts(
    folder: PipelineFolder, texts: Sequence[str], device: torch.device | str = "cpu", negative: Sequence[str] = ()
) -> Text:
    """Embed texts, from the cache as far as it has them; encoders are loaded for the others alone and freed again.

    CLIP computes in fp32, T5 and Gemma in bf16.

    Each is embedded by itself: so its embedding is the same to the bit whatever else is asked for, or was kept before.

    Args:
        folder: of the prior.
        texts: B of them.
        device: to embed on, and of the result.
        negative: texts of the unconditional branch, whose rows follow; SANA reads them without its instruction.

    Returns:
        B rows (and those of ``negative``) in fp32. Stable Diffusion 1.x and 2.x: the encoder's output. XL: the states of both encoders
        before their last layer, side by side, and the second one's projected embedding of the whole text as ``pooled``. A flow: what
        encode_for_flow() gives.

    Raises:
        ValueError: a text can't be read (see check_prompts), or an encoder can't be loaded.
    """
    check_prompts([*texts, *negative], folder)
    maker = _fingerprint(folder, torch.device(device).type)
    asked = [*texts, *(Negative(text) for text in negative)] if folder.kind == SANA else [*texts, *negative]
    keys = {text: hashlib.sha256(json.dumps([maker, *_spelled(text)]).encode()).hexdigest() for text in asked}
    rows = {text: entry for text, key in keys.items() if (entry := read_entry(key)) is not None}
    missing = [text for text in keys if text not in rows]
    if missing:
        encode = encode_for_flow if folder.kind in FLOWS else _encode
        for text, row in zip(missing, encode(folder, missing, device), strict=True):
            rows[text] = row
            write_entry(keys[text], row)
    tokens, pooled, mask = (
        torch.stack([rows[text][name] for text in asked]).to(device) if name in rows[asked[0]] else None
        for name in ("tokens", "pooled", "mask")
    )
    assert tokens is not None
    return Text(tokens, pooled, mask=mask)


def _spelled(text: str | Negative) -> list[str]:
    """Return what a text's entry in the cache is called by."""
    return [text.words, "negative"] if isinstance(text, Negative) else [text]


def _fingerprint(folder: PipelineFolder, device_type: str) -> list[str]:
    """Return what an embedding depends on beside its text: kind, encoders and tokenizers by content, and who computes."""
    parts = [str(EMBEDDING_VERSION), folder.kind, torch.__version__, transformers.__version__, device_type]
    if folder.kind in FLOWS:
        parts += [str(folder.num_long_tokens), str(folder.config("transformer").get("joint_attention_dim"))]
    for encoder, tokenizer in folder.text_encoders:
        words = sorted(file for file in (folder.path / tokenizer).iterdir() if file.suffix in (".json", ".txt"))
        for file in (*folder.files(encoder), folder.path / encoder / "config.json", *words):
            parts += [file.suffix if file == folder.single_file else file.name, file_digest(file)]
    return parts


def _encode(folder: PipelineFolder, texts: Sequence[str], device: torch.device | str) -> list[dict[str, Tensor]]:
    """Return for each text its (num_tokens, width) "tokens" and, with XL, its (pooled_width,) "pooled", on the CPU."""
    states: list[list[Tensor]] = [[] for _ in texts]
    pooled: list[dict[str, Tensor]] = [{} for _ in texts]
    for component, tokenizer, max_tokens in load_tokenizers(folder):
        encoder = load_network(ENCODER_CLASSES[component], folder, component, torch.float32).to(device)
        for i, text in enumerate(texts):
            ids = tokenizer(text, padding="max_length", max_length=max_tokens, return_tensors="pt").input_ids.to(device)
            with torch.no_grad():
                output = encoder(ids, output_hidden_states=folder.kind == STABLE_DIFFUSION_XL)
            states[i].append(output.hidden_states[-2][0] if folder.kind == STABLE_DIFFUSION_XL else output.last_hidden_state[0])
            if component == "text_encoder_2":
                pooled[i]["pooled"] = output.text_embeds[0].cpu()
    return [{"tokens": torch.cat(parts, -1).cpu(), **whole} for parts, whole in zip(states, pooled, strict=True)]
