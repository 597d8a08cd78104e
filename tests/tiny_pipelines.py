"""Random models of a few thousand weights in the architectures of Stable Diffusion 1.x, 2.x and XL, and their original (LDM) layout."""

import json
import re
import shutil

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dist_vsd.priors.embedded.captions import MAX_TOKENS, vocabulary, write_tokenizer
from dist_vsd.priors.embedded.multi_view_recipe import told_cameras

ARCHITECTURES = ("sd1", "sd2", "sd2_v", "sdxl")
WIDTH, WIDTH_2, LATENT_SIZE = 16, 24, 8
IMAGE_SIZES = {"sd1": 16, "sd2": 16, "sd2_v": 16, "sdxl": 64}


def build_tokenizer(folder, pad_token=None):
    write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder, **({"pad_token": pad_token} if pad_token else {}))


def build_text_encoder(tokenizer, width, kind=CLIPTextModel, activation="quick_gelu"):
    return kind(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        projection_dim=width, hidden_act=activation,
    )).eval()  # fmt: skip


def build_unet(architecture):
    settings = {"cross_attention_dim": WIDTH, "attention_head_dim": 4}
    if architecture != "sd1":
        settings = {"cross_attention_dim": WIDTH, "attention_head_dim": (2, 4), "use_linear_projection": True}
    if architecture == "sdxl":
        settings |= {
            "cross_attention_dim": WIDTH + WIDTH_2, "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + WIDTH_2,
        }  # fmt: skip
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **settings,
    ).eval()  # fmt: skip


def build_vae(architecture):
    levels = 4 if architecture == "sdxl" else 2
    vae = AutoencoderKL(
        block_out_channels=(8, 16) if levels == 2 else (4, 4, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4,
        sample_size=IMAGE_SIZES[architecture], down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, force_upcast=architecture == "sdxl",
    ).eval()  # fmt: skip
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(5)  # so that some pixels leave [0, 1] and are clamped
    return vae


def build_pipeline(architecture, folder):
    """Make a random pipeline; ``folder`` is for its tokenizer's files."""
    torch.manual_seed(ARCHITECTURES.index(architecture))
    tokenizer = build_tokenizer(folder / "words")
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False, set_alpha_to_one=False,
        prediction_type="v_prediction" if architecture == "sd2_v" else "epsilon",
    )  # fmt: skip
    parts = {"unet": build_unet(architecture), "vae": build_vae(architecture), "tokenizer": tokenizer, "scheduler": scheduler}
    if architecture == "sdxl":
        tokenizer_2 = build_tokenizer(folder / "words_2", pad_token="a</w>")  # as XL's pads with "!"
        encoder_2 = build_text_encoder(tokenizer_2, WIDTH_2, CLIPTextModelWithProjection, "gelu")
        parts |= {"text_encoder": build_text_encoder(tokenizer, WIDTH), "tokenizer_2": tokenizer_2, "text_encoder_2": encoder_2}
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    parts["text_encoder"] = build_text_encoder(tokenizer, WIDTH, activation="quick_gelu" if architecture == "sd1" else "gelu")
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def write_multi_view(folder):
    """Write a random prior of four views: 1.x's architecture, told cameras, with the vocabulary and the facts of this program's recipes."""
    parts = folder.parent / f"{folder.name}_parts"
    pipeline = build_pipeline("sd1", parts)
    torch.manual_seed(7)
    unet = told_cameras(pipeline.unet).eval()
    torch.nn.init.normal_(unet.class_embedding.linear_2.weight)
    pipeline.register_modules(unet=unet)
    pipeline.save_pretrained(folder)
    (folder / "dist_vsd.json").write_text(json.dumps({"vocabulary": vocabulary(), "views_per_shot": 4}))
    return folder


MVDREAM_UNET = {
    "_class_name": "MultiViewUNetModel", "image_size": LATENT_SIZE, "in_channels": 4, "out_channels": 4, "model_channels": 32,
    "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [1, 2], "num_head_channels": 16, "context_dim": WIDTH,
    "transformer_depth": 1, "camera_dim": 16, "use_checkpoint": False, "ip_dim": 0,
}  # fmt: skip


def write_mvdream(folder):
    """Write a random pipeline as MVDream's conversion does, its UNet in the original names; return that UNet in diffusers'."""
    pipeline = build_pipeline("sd2", folder.parent / f"{folder.name}_parts")
    torch.manual_seed(8)
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=(2, 4),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2, use_linear_projection=True,
    ).eval()  # fmt: skip
    tensors = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in ldm_unet(unet).items()}
    told = told_cameras(unet).eval()
    torch.nn.init.normal_(told.class_embedding.linear_2.weight)
    for layer, number in (("linear_1", 0), ("linear_2", 2)):
        for kind in ("weight", "bias"):
            tensors[f"camera_embed.{number}.{kind}"] = told.state_dict()[f"class_embedding.{layer}.{kind}"]
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "MVDreamPipeline", "unet": ["mv_unet", "MultiViewUNetModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet" / "config.json").write_text(json.dumps(MVDREAM_UNET))
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "unet" / "diffusion_pytorch_model.safetensors")
    return told


def copy_configs(folder, destination):
    """Copy a pipeline folder without its weights."""
    return shutil.copytree(folder, destination, ignore=shutil.ignore_patterns("*.safetensors"))


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
UNET = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0"}
UNET |= {"conv_norm_out": "out.0", "conv_out": "out.2"}
UNET |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
VAE = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "mid_block.attentions.0": "mid.attn_1", "group_norm": "norm"}
VAE |= {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "mid_block.resnets.0": "mid.block_1"}
VAE |= {"mid_block.resnets.1": "mid.block_2", ".resnets.": ".block.", "downsamplers.0": "downsample", "upsamplers.0": "upsample"}
OPEN_CLIP = {"embeddings.position_embedding.weight": "positional_embedding", "embeddings.token_embedding": "token_embedding"}
OPEN_CLIP |= {"final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks", "layer_norm": "ln_"}
OPEN_CLIP |= {"fc1": "c_fc", "fc2": "c_proj", "self_attn": "attn", "text_projection.weight": "text_projection"}


def renamed(name, names):
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def ldm_unet(unet):
    """Name a UNet's tensors as the original code does: blocks are counted through, whatever they hold."""
    per_block, tensors = unet.config.layers_per_block + 1, {}
    for name, tensor in unet.state_dict().items():
        if block := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
            way, number, part, layer, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
            layer = per_block - 1 if part in ("downsamplers", "upsamplers") else layer
            index = number * per_block + layer + (way == "down")
            has_attention = f"up_blocks.{number}.attentions.0.norm.weight" in unet.state_dict()
            place = {"resnets": "0.", "attentions": "1.", "downsamplers": "0.op.", "upsamplers": f"{1 + has_attention}.conv."}[part]
            rest = rest.removeprefix("conv.") if part.endswith("samplers") else renamed(rest, RESNET) if part == "resnets" else rest
            new = f"{'input' if way == 'down' else 'output'}_blocks.{index}.{place}{rest}"
        elif name.startswith("mid_block."):
            part = name.removeprefix("mid_block.")
            new = "middle_block." + renamed(part, MIDDLE | (RESNET if part.startswith("resnets") else {}))
        else:
            new = next(new + name.removeprefix(old) for old, new in UNET.items() if name.startswith(old))
        tensors[f"model.diffusion_model.{new}"] = tensor
    return tensors


def ldm_vae(vae):
    levels, tensors = len(vae.config.block_out_channels), {}
    for name, tensor in vae.state_dict().items():
        new = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
        new = renamed(re.sub(r"down_blocks\.", "down.", new), VAE)
        is_attention = ".attn_1." in new and new.endswith("weight") and ".norm." not in new
        tensors[f"first_stage_model.{new}"] = tensor[:, :, None, None] if is_attention else tensor
    return tensors


def ldm_clip(encoder, prefix):
    state = encoder.state_dict() | {"embeddings.position_ids": torch.arange(MAX_TOKENS)[None]}
    return {f"{prefix}transformer.text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in state.items()}


def ldm_open_clip(encoder, prefix):
    state = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    tensors = {f"{prefix}logit_scale": torch.ones(())}
    for name, tensor in state.items():
        if ".q_proj." in name:
            ending = "in_proj_" + name.rsplit(".", 1)[1]
            new = renamed(name.split("q_proj")[0], OPEN_CLIP) + ending
            tensor = torch.cat([state[name.replace("q_proj", other)] for other in ("q_proj", "k_proj", "v_proj")])
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        else:
            new = renamed(name, OPEN_CLIP)
            tensor = tensor.T if new == "text_projection" else tensor
        tensors[prefix + new] = tensor
    return tensors


def write_ldm(pipeline, architecture, file):
    """Write a pipeline's weights as one file in the original layout, with some of what published files hold beside them."""
    tensors = ldm_unet(pipeline.unet) | ldm_vae(pipeline.vae) | {"alphas_cumprod": torch.ones(1000)}
    if architecture == "sd1":
        tensors |= ldm_clip(pipeline.text_encoder, "cond_stage_model.")
    elif architecture == "sdxl":
        tensors |= ldm_clip(pipeline.text_encoder, "conditioner.embedders.0.")
        tensors |= ldm_open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    else:
        tensors |= ldm_open_clip(pipeline.text_encoder, "cond_stage_model.model.")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)
    return file
