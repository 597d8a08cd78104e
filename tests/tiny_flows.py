"""Random rectified flows of a few thousand weights, in the architectures of Stable Diffusion 3, FLUX and SANA."""

import json

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from dist_vsd.priors.embedded.captions import vocabulary
from tests.tiny_pipelines import build_text_encoder, build_tokenizer

FLOWS = ("sd3", "flux", "sana")
WIDTH, WIDTH_2, LONG_WIDTH, LONG_TOKENS = 16, 24, 48, 12
LATENT_SIZE, IMAGE_SIZE, CHANNELS = 8, 16, 4
SHIFT_FACTOR, SCALING_FACTOR = 0.06, 1.5
EVERY_ENCODER = ("clip", "clip_2", "t5")


def build_long_tokenizer(begin="", end=""):
    """Return a tokenizer of words with a token at the beginning or the end, as Gemma's or T5's."""
    words = ["<pad>", "<unk>", *filter(None, (begin, end)), *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single, special = " ".join(filter(None, (begin, "$A", end))), [(word, words.index(word)) for word in (begin, end) if word]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def build_t5(tokenizer):
    return T5EncoderModel(T5Config(
        vocab_size=len(tokenizer), d_model=LONG_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
    )).eval()  # fmt: skip


def build_gemma(tokenizer):
    return Gemma2Model(Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=LONG_WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )).eval()  # fmt: skip


def build_vae():
    vae = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, latent_channels=CHANNELS, sample_size=IMAGE_SIZE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=SHIFT_FACTOR, scaling_factor=SCALING_FACTOR,
    ).eval()  # fmt: skip
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(5)  # so that some pixels leave [0, 1] and are clamped
    return vae


def build_sd3(folder, encoders=EVERY_ENCODER, dual=()):
    """Make a random Stable Diffusion 3 with some of its text encoders; ``folder`` is for its tokenizers' files."""
    tokenizer, tokenizer_2 = build_tokenizer(folder / "words"), build_tokenizer(folder / "words_2", pad_token="a</w>")
    long = build_long_tokenizer(end="</s>")
    has_2, has_t5 = "clip_2" in encoders, "t5" in encoders
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE, patch_size=2, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=LONG_WIDTH if has_t5 or has_2 else WIDTH, caption_projection_dim=16,
        pooled_projection_dim=WIDTH + WIDTH_2 * has_2, pos_embed_max_size=8, dual_attention_layers=dual,
        qk_norm="rms_norm" if dual else None,
    ).eval()  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=build_vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=build_text_encoder(tokenizer, WIDTH, CLIPTextModelWithProjection), tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer_2, WIDTH_2, CLIPTextModelWithProjection, "gelu") if has_2 else None,
        tokenizer_2=tokenizer_2 if has_2 else None,
        text_encoder_3=build_t5(long) if has_t5 else None, tokenizer_3=long if has_t5 else None,
    )  # fmt: skip


def build_flux(folder, guidance_embeds=True):
    tokenizer, long = build_tokenizer(folder / "words"), build_long_tokenizer(end="</s>")
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4 * CHANNELS, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=LONG_WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=guidance_embeds, axes_dims_rope=(2, 4, 2),
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    return FluxPipeline(
        transformer=transformer, vae=build_vae(), scheduler=scheduler, text_encoder=build_text_encoder(tokenizer, WIDTH, CLIPTextModel),
        tokenizer=tokenizer, text_encoder_2=build_t5(long), tokenizer_2=long,
    )  # fmt: skip


def build_sana(_folder):
    tokenizer = build_long_tokenizer(begin="<bos>")
    transformer = SanaTransformer2DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=LONG_WIDTH, sample_size=LATENT_SIZE, patch_size=1,
        timestep_scale=0.5,
    ).eval()  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=CHANNELS, attention_head_dim=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), scaling_factor=0.41,
    ).eval()  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(tokenizer=tokenizer, text_encoder=build_gemma(tokenizer), vae=vae, transformer=transformer, scheduler=scheduler)


BUILDERS = {"sd3": build_sd3, "flux": build_flux, "sana": build_sana}


def build_flow(kind, folder):
    """Make a random pipeline; ``folder`` is for its tokenizers' files."""
    torch.manual_seed(FLOWS.index(kind))
    return BUILDERS[kind](folder)


def write_flow(kind, folder, pipeline=None, **facts):
    """Write a random pipeline with few tokens of T5 or Gemma, and FLUX with the size of its pictures, which it does not say itself."""
    pipeline = pipeline or build_flow(kind, folder.parent / f"{folder.name}_parts")
    pipeline.save_pretrained(folder)
    write_facts(folder, **({"t5_tokens": LONG_TOKENS, "image_size": IMAGE_SIZE} | facts))
    return folder


def write_facts(folder, **facts):
    (folder / "dist_vsd.json").write_text(json.dumps(facts))
