"""The networks of the embedded flow prior: a Stable Diffusion 3 in small, on the VAE and the text encoder of the embedded prior."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dist_vsd.priors.embedded.networks import LATENT_CHANNELS, TEXT_WIDTH, build_tokenizer
from dist_vsd.priors.embedded.pictures import IMAGE_SIZE

LATENT_SIZE, PATCH_SIZE = IMAGE_SIZE // 4, 2
NUM_LAYERS, NUM_HEADS, HEAD_WIDTH = 5, 4, 32
TIME_SCALE = 1000.0  # SD3 is told 1000 s


@dataclasses.dataclass(frozen=True)
class FlowNetworks:
    """What the recipe trains, and what it takes from the base."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModelWithProjection
    transformer: SD3Transformer2DModel
    vae: AutoencoderKL


def start_networks(base: Path, folder: Path) -> FlowNetworks:
    """Build a transformer that knows nothing yet, and load the base's VAE and text encoder.

    Args:
        base: a pipeline folder of the single-view recipe.
        folder: for the tokenizer.
    """
    transformer = build_transformer()
    vae = AutoencoderKL.from_pretrained(base / "vae", use_safetensors=True, local_files_only=True).float()
    return FlowNetworks(build_tokenizer(folder), projected_text_encoder(base), transformer, vae.requires_grad_(False).eval())


def build_transformer() -> SD3Transformer2DModel:
    """The velocity of 16x16x4 latents: 64 patches and the words attend to one another.

    Every block begins as the identity and the velocity as zero (adaLN-Zero, Peebles and Xie 2023, section 3.2), which diffusers leaves out.
    """
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=PATCH_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=NUM_LAYERS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=NUM_HEADS,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=NUM_HEADS * HEAD_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE // PATCH_SIZE,
        qk_norm="rms_norm",
    )
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    modulations = [m.linear for m in transformer.modules() if isinstance(m, (AdaLayerNormZero, AdaLayerNormContinuous))]
    for layer in (*modulations, transformer.proj_out):
        nn.init.zeros_(layer.weight)
    return transformer


def projected_text_encoder(base: Path) -> CLIPTextModelWithProjection:
    """Load the base's text encoder; its pooled text passes through a projection, which begins as the identity."""
    found = CLIPTextModel.from_pretrained(base / "text_encoder", use_safetensors=True, local_files_only=True).float()
    settings = {name: value for name, value in found.config.to_diff_dict().items() if name not in ("architectures", "dtype", "model_type")}
    projected = CLIPTextModelWithProjection(CLIPTextConfig(**settings | {"projection_dim": found.config.hidden_size}))
    # transformers 5 names the tensors of a model without projection without "text_model.", 4 with it.
    projected.text_model.load_state_dict({name.removeprefix("text_model."): value for name, value in found.state_dict().items()})
    nn.init.eye_(projected.text_projection.weight)
    return projected


def encode_texts(text_encoder: CLIPTextModelWithProjection, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return what SD3 reads of (B, 16) tokens: (B, 16, 96) words before the last layer, and the (B, 96) pooled text."""
    output = text_encoder(tokens, output_hidden_states=True)
    return output.hidden_states[-2], output.text_embeds


def predict_velocity(transformer: SD3Transformer2DModel, x_t: Tensor, s: Tensor, words: Tensor, pooled: Tensor) -> Tensor:
    """Return v of (B, 4, 16, 16) latents at (B,) s."""
    return transformer(x_t, encoder_hidden_states=words, pooled_projections=pooled, timestep=TIME_SCALE * s, return_dict=False)[0]
