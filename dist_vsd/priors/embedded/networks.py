"""The networks of the embedded prior: a Stable Diffusion in small, and a small CLIP. Sizes are chosen for two CPU cores."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dist_vsd.priors.embedded.captions import MAX_TOKENS, write_tokenizer
from dist_vsd.priors.embedded.pictures import IMAGE_SIZE

TEXT_WIDTH = 96
LATENT_CHANNELS = 4


def build_tokenizer(folder: Path, more: str = "") -> CLIPTokenizer:
    """Write the closed-vocabulary tokenizer, which knows the words ``more`` too, to ``folder`` and load it as diffusers will."""
    write_tokenizer(folder, more)
    return CLIPTokenizer.from_pretrained(folder)


def build_vae() -> AutoencoderKL:
    """64x64x3 pictures to 16x16x4 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def build_unet() -> UNet2DConditionModel:
    """The noise predictor on 16x16x4 latents; text enters by cross-attention in the two lower blocks."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def _text_config(tokenizer: CLIPTokenizer, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The prior's text encoder, trained together with the UNet."""
    return CLIPTextModel(_text_config(tokenizer, layers=2))


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule: scaled-linear betas, eps-prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The small CLIP that R-precision and CLIP guidance use."""
    text = _text_config(tokenizer, layers=2).to_dict()
    vision = {
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "projection_dim": TEXT_WIDTH,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=TEXT_WIDTH))


def save_pipeline(
    folder: Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> None:
    """Write a StableDiffusionPipeline folder in fp16 safetensors; the networks are on the CPU and in fp16 from then on."""
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": build_scheduler()}
    pipeline = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.to("cpu", torch.float16).save_pretrained(folder)
