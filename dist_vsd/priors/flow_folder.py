"""Checking the pipeline folder of a rectified flow (Stable Diffusion 3, FLUX, SANA) before anything is built from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dist_vsd.priors.pipeline_files import check_tokenizer, find_variant, read_json, read_shapes
from dist_vsd.priors.pipeline_kinds import FACTS_FILE, FLOWS, SANA, STABLE_DIFFUSION_3, WEIGHTED, FlowKind, PipelineFolder

EULER, DPM_SOLVER = "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"
FIRST_OF_ENCODERS = {
    "CLIPTextModel": "token_embedding.weight", "CLIPTextModelWithProjection": "token_embedding.weight",
    "T5EncoderModel": "shared.weight", "Gemma2Model": "embed_tokens.weight",
}  # fmt: skip
# transformers leaves defaults out of the configurations that it writes.
VOCABULARIES = {"CLIPTextModel": 49408, "CLIPTextModelWithProjection": 49408, "T5EncoderModel": 32128, "Gemma2Model": 256000}


def check_flow_folder(path: Path, prior: str) -> PipelineFolder:
    """Check the folder of a rectified flow, with its weights.

    Args:
        path: of the folder, whose model_index.json names one of FLOWS.
        prior: its name, for errors.

    Raises:
        ValueError: it is incomplete, damaged or of mixed parts, or its transformer has not the text encoders that it reads.
    """
    index = read_json(path / "model_index.json", prior)
    kind = FLOWS[index["_class_name"]]
    facts = read_json(path / FACTS_FILE, prior) if (path / FACTS_FILE).exists() else {}
    _check_facts(facts, prior)
    for name in ("transformer", "vae", "scheduler"):
        if not (path / name).is_dir():
            raise ValueError(f"prior {prior!r} is incomplete: {path / name} is missing; copy the whole pipeline folder")
    encoders = _encoders_of(index, kind, path, prior)
    components = ("transformer", "vae", *encoders)
    _check_classes(index, kind, components, prior)
    for encoder, tokenizer in encoders.items():
        is_clip = "CLIP" in index[encoder][1]
        if not is_clip and not (path / tokenizer / "tokenizer.json").exists():
            raise ValueError(f"prior {prior!r} is incomplete: {path / tokenizer / 'tokenizer.json'} is missing; copy the whole folder")
        check_tokenizer(path / tokenizer, prior)
    variants = {component: find_variant(path / component, WEIGHTED[component], prior) for component in components}
    folder = PipelineFolder(path, variants, facts, index["_class_name"])
    flow_shift(folder, 1)
    _check_widths(folder, prior)
    for component in components:
        _check_shape(folder, component, prior)
    return folder


def flow_shift(folder: PipelineFolder, num_tokens: int) -> float:
    """Return k of s = k u / (1 + (k - 1) u), as a flow's scheduler has it.

    A dynamic shift grows with the picture: mu is linear in the number of the transformer's tokens, and k = exp(mu), or mu itself.

    Args:
        folder: checked, or about to be.
        num_tokens: of a picture.

    Raises:
        ValueError: the scheduler is none of a rectified flow, or its shift is not a positive number.
    """
    config, prior = folder.config("scheduler"), str(folder.path)
    name = config.get("_class_name")
    is_flow = name == EULER or (name == DPM_SOLVER and config.get("prediction_type") == "flow_prediction")
    if not is_flow:
        raise ValueError(
            f"prior {prior!r} has the scheduler {name} (prediction_type {config.get('prediction_type')!r}): {FLOWS[folder.kind].title} is "
            f"a rectified flow, with {EULER} or a {DPM_SOLVER} that predicts it; copy it anew"
        )
    shift = config.get("flow_shift", 1.0) if name == DPM_SOLVER else config.get("shift", 1.0)
    if name == EULER and config.get("use_dynamic_shifting"):
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = base + (most - base) * (num_tokens - low) / (high - low)
        shift = math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
    if not isinstance(shift, int | float) or not 0.0 < shift < math.inf:
        raise ValueError(f"prior {prior!r} has a shift of {shift!r} in its scheduler, it must be a positive number: copy it anew")
    return float(shift)


def _check_facts(facts: dict[str, Any], prior: str) -> None:
    count = facts.get("t5_tokens", 0)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"prior {prior!r}: t5_tokens in {FACTS_FILE} must be 0 (none) or more, got {count!r}: change it")


def _encoders_of(index: dict[str, Any], kind: FlowKind, path: Path, prior: str) -> dict[str, str]:
    """Return the text encoders that a folder has, each with its tokenizer; ValueError for one that its transformer can't do without."""
    found = {}
    for encoder, tokenizer, _ in kind.encoders:
        is_named = (index.get(encoder) or (None, None))[1] is not None
        if is_named and (path / encoder).is_dir() and (path / tokenizer).is_dir():
            found[encoder] = tokenizer
        elif is_named or encoder not in kind.may_lack:
            missing = encoder if not (path / encoder).is_dir() else tokenizer
            raise ValueError(
                f"prior {prior!r} is a transformer without its text encoders: {path / missing} is missing; copy the whole pipeline folder"
            )
    return found


def _check_classes(index: dict[str, Any], kind: FlowKind, components: tuple[str, ...], prior: str) -> None:
    classes = {"transformer": kind.transformer, "vae": kind.vae} | {encoder: name for encoder, _, name in kind.encoders}
    for name in components:
        _, found = index.get(name, ("", classes[name]))
        if found != classes[name]:
            raise ValueError(f"prior {prior!r} has a {name} of class {found}, not {classes[name]}: choose another prior")


def _check_widths(folder: PipelineFolder, prior: str) -> None:
    """Refuse parts that don't belong together, by their configurations."""
    transformer, kind = folder.config("transformer"), FLOWS[folder.kind]
    given, wanted = folder.config("vae").get("latent_channels", 4), transformer.get("in_channels", 16) // kind.packing**2
    if given != wanted:
        raise ValueError(f"prior {prior!r} is of mixed parts: its transformer takes {wanted} channels, its vae gives {given}")
    if folder.kind == SANA and transformer.get("guidance_embeds"):
        raise ValueError(f"prior {prior!r} is a SANA of few steps (guidance_embeds): choose one that was not distilled")
    configs = {name: folder.config(name) for name in folder.encoder_classes}
    clip = {name: config for name, config in configs.items() if "CLIP" in folder.encoder_classes[name]}
    others = {name: config for name, config in configs.items() if name not in clip}
    reads = transformer.get("caption_channels" if folder.kind == SANA else "joint_attention_dim")
    for name, config in others.items():
        width = _width(config, folder.encoder_classes[name])
        if width != reads:
            raise ValueError(f"prior {prior!r} is of mixed parts: its transformer reads texts of width {reads}, its {name} writes {width}")
    projections = folder.kind == STABLE_DIFFUSION_3
    pooled = sum(config.get("projection_dim" if projections else "hidden_size", 512) for config in clip.values())
    if clip and transformer.get("pooled_projection_dim", pooled) != pooled:
        raise ValueError(
            f"prior {prior!r} is of mixed parts: its transformer reads whole texts of width {transformer['pooled_projection_dim']}, its "
            f"CLIP text encoders write {pooled}"
        )
    width = sum(config.get("hidden_size", 512) for config in clip.values())
    if projections and width > reads:
        raise ValueError(
            f"prior {prior!r} is of mixed parts: its transformer reads texts of width {reads}, its CLIP text encoders write {width}"
        )


def _width(config: dict[str, Any], name: str) -> int:
    """Return the width of what a text encoder of a class writes."""
    return config.get("d_model", 512) if name == "T5EncoderModel" else config.get("hidden_size", 2304 if name == "Gemma2Model" else 512)


def _check_shape(folder: PipelineFolder, component: str, prior: str) -> None:
    """Refuse weights of something else, by the shape of one tensor; SANA's autoencoder, which comes in many forms, by its headers alone."""
    config, kind = folder.config(component), FLOWS[folder.kind]
    shapes = read_shapes(folder.files(component), prior)
    if component == "transformer":
        heads, width = config.get("num_attention_heads", 0), config.get("attention_head_dim", 0)
        first, expected = kind.first, (heads * width, config.get("in_channels", 16))
    elif component == "vae":
        if kind.vae != "AutoencoderKL":
            return
        first, expected = "encoder.conv_in.weight", (config.get("block_out_channels", [0])[0], config.get("in_channels", 3))
    else:
        first = FIRST_OF_ENCODERS[folder.encoder_classes[component]]
        name = folder.encoder_classes[component]
        expected = (config.get("vocab_size", VOCABULARIES[name]), _width(config, name))
    found = next((shape[:2] for name, shape in shapes.items() if name == first or name.endswith(f".{first}")), None)
    if found != expected:
        told = "is not there" if found is None else f"has the shape {found}"
        raise ValueError(
            f"prior {prior!r} is damaged: its {component} has wrong weights ({first} {told}, its configuration says {expected}); "
            "copy it anew"
        )
