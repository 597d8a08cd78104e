"""Rectified flows at their real sizes with random weights, built offline: for what a run costs, not for what it makes.

As architectures.py; the settings are those of the published pipelines' transformer/config.json and vae/config.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import nn

from dist_vsd.diffusion.process import RectifiedFlow
from dist_vsd.priors.architecture_names import size_of
from dist_vsd.priors.architectures import drawn_texts, random_network
from dist_vsd.priors.flow import FlowPrior, shrinks
from dist_vsd.priors.flow_check import require_no_guidance_embedding, require_tokens
from dist_vsd.priors.flow_config import AS_IT_IS, FlowConfig
from dist_vsd.priors.networks import dtype_of
from dist_vsd.priors.prior import TextEmbeddings
from dist_vsd.priors.stable_diffusion_3 import StableDiffusion3Network

SHIFT = 3.0  # scheduler/scheduler_config.json of all three


@dataclasses.dataclass(frozen=True)
class FlowArchitecture:
    """What distinguishes a Stable Diffusion 3's networks from the defaults of diffusers.

    Attributes:
        source: whose configuration files say so.
        transformer: settings of SD3Transformer2DModel.
        vae: settings of AutoencoderKL.
        num_tokens: of a text: CLIP's 77 and T5's 256.
    """

    source: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    num_tokens: int = 77 + 256


_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32, "sample_size": 1024,
    "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": True,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_MEDIUM = {
    "sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}  # fmt: skip
FLOW_ARCHITECTURES = {
    "sd3-medium": FlowArchitecture(source="stabilityai/stable-diffusion-3-medium-diffusers", transformer=_MEDIUM, vae=_VAE),
    "sd35-medium": FlowArchitecture(
        source="stabilityai/stable-diffusion-3.5-medium",
        transformer={**_MEDIUM, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
        vae=_VAE,
    ),
    "sd35-large": FlowArchitecture(
        source="stabilityai/stable-diffusion-3.5-large",
        transformer={**_MEDIUM, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"},
        vae=_VAE,
    ),
    "tiny-sd3": FlowArchitecture(
        source="3.5's, made small for tests",
        transformer={
            "sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 16,
            "caption_projection_dim": 16, "pooled_projection_dim": 8, "pos_embed_max_size": 8, "in_channels": 4, "out_channels": 4,
            "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
        vae={
            **_VAE, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4, "sample_size": 16,
            "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        num_tokens=12,
    ),
}  # fmt: skip


def build_transformer(
    size: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> SD3Transformer2DModel:
    """Build a transformer with random weights, frozen; see random_network. Its table of places is what it is in the published one."""
    settings = FLOW_ARCHITECTURES[size].transformer
    transformer = random_network(SD3Transformer2DModel, settings, device, dtype, seed)
    if torch.device(device).type != "meta":
        shallow: nn.Module = SD3Transformer2DModel(**{**settings, "num_layers": 1, "dual_attention_layers": ()})
        transformer.pos_embed.pos_embed.copy_(shallow.pos_embed.pos_embed)
    return transformer


class RandomFlowPrior(FlowPrior):
    """A Stable Diffusion 3 of real size that has learned nothing (see FlowPrior): ``--prior random:sd3-medium``.

    Args:
        size: one of FLOW_ARCHITECTURES.
        device: of the networks.
        dtype: of their weights; the VAE stays in fp32 where fp16 is asked for, as a loaded one's.
        flow: what is asked of it beside its own settings.
    """

    def __init__(
        self,
        size: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        flow: FlowConfig = AS_IT_IS,
    ) -> None:
        self.size = size
        vae = random_network(AutoencoderKL, FLOW_ARCHITECTURES[size].vae, device, torch.float32 if dtype == torch.float16 else dtype, 0)
        network = StableDiffusion3Network(build_transformer(size, device, dtype), RectifiedFlow(flow.shift or SHIFT))
        own = FLOW_ARCHITECTURES[size].transformer["sample_size"] * shrinks(vae)
        super().__init__(network, vae, flow.image_size or own)

    @classmethod
    def load(
        cls,
        prior: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        flow: FlowConfig = AS_IT_IS,
    ) -> RandomFlowPrior:
        """Build the prior that a name means, as size_of() takes it."""
        return cls(size_of(prior), device, dtype, flow)

    def network_of(self, name: str) -> StableDiffusion3Network:
        """Build another transformer of this size, with other weights, for a phi that does not sit on this one's."""
        check_random_flow(f"random:{self.size}", (), name)
        return StableDiffusion3Network(build_transformer(self.size, self.device, dtype_of(self.transformer), seed=1), self.process)

    def embed(self, prompts: list[str], negative_prompt: str = "") -> TextEmbeddings:
        """Draw a normal embedding for each text, by its letters: equal texts have equal ones."""
        config, num_tokens = self.transformer.config, FLOW_ARCHITECTURES[self.size].num_tokens
        widths = (config.joint_attention_dim, config.pooled_projection_dim)
        rows = drawn_texts([*prompts, negative_prompt], num_tokens, *widths, self.device)
        return TextEmbeddings(rows[:-1], rows[-1:].expand(len(prompts)))


def check_random_flow(
    prior: str,
    texts: Sequence[str],
    prior_of_phi: str = "",
    flow: FlowConfig = AS_IT_IS,
) -> None:
    """Refuse a size that there is not, a phi on a network of another size, or what it can't do; ValueError in one line."""
    size = size_of(prior)
    if prior_of_phi and prior_of_phi != f"random:{size}":
        raise ValueError(f"phi's prior must be random:{size} beside prior {prior}, got {prior_of_phi!r}: change --score.prior")
    require_no_guidance_embedding(flow, prior)
    architecture = FLOW_ARCHITECTURES[size]
    require_tokens(flow.image_size, 2 ** (len(architecture.vae["block_out_channels"]) - 1) * 2, architecture.transformer)
