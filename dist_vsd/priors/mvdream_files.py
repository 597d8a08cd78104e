"""MVDream's UNet as its conversion to diffusers writes it: a configuration and tensors of its own, told in the terms of diffusers' UNet.

The folder is a pipeline's (MVDreamPipeline); text encoder, VAE and scheduler are Stable Diffusion 2.1's. Its UNet, of class
MultiViewUNetModel, has the original layout's names, with ``camera_embed`` beside ``time_embed``.
"""

from __future__ import annotations

from typing import Any

MVDREAM_PIPELINES = ("MVDreamPipeline", "MVDreamStableDiffusionPipeline")
MVDREAM_UNET = "MultiViewUNetModel"
FIRST_TENSOR, CAMERA_TENSOR = "input_blocks.0.0.weight", "camera_embed.0.weight"
NEEDED = ("image_size", "model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "context_dim", "camera_dim")


def unet_settings(config: dict[str, Any], prior: str) -> dict[str, Any]:
    """Return a UNet's configuration as diffusers' UNet2DConditionModel takes it; one of diffusers' own as it is.

    Args:
        config: of unet/config.json.
        prior: named in errors.

    Raises:
        ValueError: something is missing, or it is ImageDream's, which wants a picture too.
    """
    if config.get("_class_name") != MVDREAM_UNET:
        return config
    missing = [name for name in NEEDED if config.get(name) is None]
    if missing:
        raise ValueError(f"prior {prior!r} is damaged: its unet's configuration lacks {missing[0]}; copy it anew")
    if config.get("ip_dim"):
        raise ValueError(f"prior {prior!r} is ImageDream, which wants a picture beside the text: choose MVDream")
    width = config["context_dim"]
    channels = [config["model_channels"] * times for times in config["channel_mult"]]
    per_head, heads = config.get("num_head_channels", -1), config.get("num_heads", -1)
    attends = [2**level in config["attention_resolutions"] for level in range(len(channels))]
    return {
        "sample_size": config["image_size"],
        "in_channels": config.get("in_channels", 4),
        "out_channels": config.get("out_channels", 4),
        "block_out_channels": channels,
        "layers_per_block": config["num_res_blocks"],
        "cross_attention_dim": width[0] if isinstance(width, list) else width,
        "attention_head_dim": [heads if per_head == -1 else count // per_head for count in channels],  # the number of heads, in diffusers
        "transformer_layers_per_block": config.get("transformer_depth", 1),
        "down_block_types": ["CrossAttnDownBlock2D" if attended else "DownBlock2D" for attended in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attended else "UpBlock2D" for attended in reversed(attends)],
        "use_linear_projection": True,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": config["camera_dim"],
    }
