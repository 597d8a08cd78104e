"""The kinds of pipelines by the class that their model_index.json names, and what a checked one is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dist_vsd.priors.mvdream_files import unet_settings
from dist_vsd.priors.pipeline_files import LDM_PREFIXES, read_json, read_shapes, weight_files

STABLE_DIFFUSION, STABLE_DIFFUSION_XL, MVDREAM = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "MVDreamPipeline"
STABLE_DIFFUSION_3, FLUX, SANA = "StableDiffusion3Pipeline", "FluxPipeline", "SanaPipeline"
VIEWS_TOGETHER = 4  # that a multi-view prior scores as one sample
FACTS_FILE = "dist_vsd.json"
# Components with weights, and the stem of their weight files.
WEIGHTED = dict.fromkeys(("unet", "transformer", "vae"), "diffusion_pytorch_model")
WEIGHTED |= dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), "model")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowKind:
    """What a pipeline of a rectified flow is made of.

    Attributes:
        title: what it is called.
        transformer: its class in diffusers, of which ``first`` is a tensor of (width, channels of a latent, ...).
        first: see ``transformer``.
        vae: its autoencoder's class in diffusers.
        encoders: of each text encoder its folder, its tokenizer's, and its class in transformers.
        may_lack: encoders that its transformer was trained to do without.
        num_tokens: that the encoder which is no CLIP gives, padding included.
        packing: latents on a side of one of the transformer's tokens, where its configuration (patch_size) does not say so.
        image_size: of its training, pixels, where its configuration does not say so.
    """

    title: str
    transformer: str
    first: str
    vae: str
    encoders: tuple[tuple[str, str, str], ...]
    may_lack: tuple[str, ...] = ()
    num_tokens: int
    packing: int = 1
    image_size: int = 0


FLOWS = {
    STABLE_DIFFUSION_3: FlowKind(
        title="Stable Diffusion 3",
        transformer="SD3Transformer2DModel",
        first="pos_embed.proj.weight",
        vae="AutoencoderKL",
        encoders=(
            ("text_encoder", "tokenizer", "CLIPTextModelWithProjection"),
            ("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection"),
            ("text_encoder_3", "tokenizer_3", "T5EncoderModel"),
        ),
        may_lack=("text_encoder_2", "text_encoder_3"),
        num_tokens=256,
    ),
    FLUX: FlowKind(
        title="FLUX",
        transformer="FluxTransformer2DModel",
        first="x_embedder.weight",
        vae="AutoencoderKL",
        encoders=(("text_encoder", "tokenizer", "CLIPTextModel"), ("text_encoder_2", "tokenizer_2", "T5EncoderModel")),
        num_tokens=512,
        packing=2,
        image_size=1024,
    ),
    SANA: FlowKind(
        title="SANA",
        transformer="SanaTransformer2DModel",
        first="patch_embed.proj.weight",
        vae="AutoencoderDC",
        encoders=(("text_encoder", "tokenizer", "Gemma2Model"),),
        num_tokens=300,
    ),
}


@dataclasses.dataclass(frozen=True)
class PipelineFolder:
    """A checked pipeline.

    Attributes:
        path: of the folder with its configurations and tokenizers, and, unless there is a single file, its weights.
        variants: for each weighted component, the variant of its files ("fp16") or None.
        facts: of FACTS_FILE, which only priors of this program's recipes have: their vocabulary, the cameras that they were trained on,
            how many views they score together (views_per_shot), if more than one, and a flow's t5_tokens (see num_long_tokens).
        kind: STABLE_DIFFUSION, STABLE_DIFFUSION_XL or MVDREAM, or one of FLOWS.
        single_file: with the weights of all components in the original layout, or None.
        zeros_for_empty_prompt: whether the empty negative prompt stands for zeros, not for its embedding.
    """

    path: Path
    variants: dict[str, str | None]
    facts: dict[str, Any]
    kind: str = STABLE_DIFFUSION
    single_file: Path | None = None
    zeros_for_empty_prompt: bool = False

    @property
    def text_encoders(self) -> list[tuple[str, str]]:
        """The names of its text encoders, each with its tokenizer's."""
        if self.kind in FLOWS:
            return [(encoder, tokenizer) for encoder, tokenizer, _ in FLOWS[self.kind].encoders if encoder in self.variants]
        return text_encoders(self.kind)

    @property
    def encoder_classes(self) -> dict[str, str]:
        """The class of each of a flow's text encoders."""
        return {encoder: name for encoder, _, name in FLOWS[self.kind].encoders if encoder in self.variants}

    @property
    def num_long_tokens(self) -> int:
        """How many tokens of T5 or Gemma a flow reads; the facts' t5_tokens has the last word, and 0 leaves T5 out."""
        return self.facts.get("t5_tokens", FLOWS[self.kind].num_tokens)

    @property
    def views_per_shot(self) -> int:
        """How many views it scores together."""
        return VIEWS_TOGETHER if self.kind == MVDREAM else self.facts.get("views_per_shot", 1)

    @property
    def unet_settings(self) -> dict[str, Any]:
        """The UNet's configuration in the terms of diffusers."""
        return unet_settings(self.config("unet"), str(self.path))

    def config(self, component: str) -> dict[str, Any]:
        """Return a component's configuration, of the scheduler too; ValueError if it is not there."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return read_json(self.path / component / name, str(self.path))

    def files(self, component: str) -> list[Path]:
        """Return the files that hold a component's weights."""
        if self.single_file is not None:
            return [self.single_file]
        return weight_files(self.path / component, WEIGHTED[component], self.variants[component])

    def shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """Return the shape of each of a component's tensors, by the headers of its files.

        Raises:
            ValueError: a file can't be read.
        """
        shapes = read_shapes(self.files(component), str(self.path))
        return part_of(shapes, component) if self.single_file is not None else shapes


def text_encoders(kind: str) -> list[tuple[str, str]]:
    """Return the names of a Stable Diffusion's text encoders, each with its tokenizer's."""
    pairs = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")]
    return pairs if kind == STABLE_DIFFUSION_XL else pairs[:1]


def part_of(shapes: dict[str, tuple[int, ...]], component: str) -> dict[str, tuple[int, ...]]:
    """Return what belongs to a component, of a whole model in the original layout."""
    return {name: shape for name, shape in shapes.items() if name.startswith(LDM_PREFIXES[component])}
