"""Stable Diffusion 1.x, 2.x and XL, or anything laid out like them, as a frozen prior; the embedded prior is loaded by the same lines."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from dist_vsd.cameras import Cameras
from dist_vsd.diffusion.process import VariancePreserving
from dist_vsd.priors.attention import use_attention
from dist_vsd.priors.compiled import compile_regions, repeated
from dist_vsd.priors.networks import dtype_of, load_network, placed
from dist_vsd.priors.pipeline_files import read_json
from dist_vsd.priors.pipeline_folder import SDXL_LATENT_SCALE, STABLE_DIFFUSION_XL, PipelineFolder, find_pipeline
from dist_vsd.priors.pipeline_kinds import FLOWS
from dist_vsd.priors.prior import NUM_FIELDS, Text, TextEmbeddings
from dist_vsd.priors.text_encoder import embed_texts
from dist_vsd.priors.text_projections import TextProjections

# What two UNets must share to look at the same x_t and to read the same texts.
SHARED_BY_UNETS = ("in_channels", "cross_attention_dim", "addition_embed_type", "projection_class_embeddings_input_dim")


class DenoisingUnet(nn.Module):
    """A Stable Diffusion's UNet as a Network (see priors/prior.py).

    Args:
        unet: of diffusers.
        process: what it predicts.
        takes_projected: whether texts come with keys and values that this very network has made; else it makes its own.
    """

    adapted = MappingProxyType(
        {
            "attention": ("to_q", "to_k", "to_v", "to_out.0"),
            "feedforward": ("ff.net.0.proj", "ff.net.2"),
            "convolutions": ("conv_in", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_out"),
            "time": ("time_emb_proj",),
        }
    )
    can_be_replayed, compiled = True, "off"

    def __init__(self, unet: UNet2DConditionModel, process: VariancePreserving, takes_projected: bool = True) -> None:
        super().__init__()
        self.unet, self.process = unet, process
        self.takes_projected, self._text_projections = takes_projected, TextProjections(unet)

    @property
    def time_embedding(self) -> nn.Module:
        """See Network."""
        return self.unet.time_embedding

    @property
    def time_width(self) -> int:
        """See Network."""
        return self.unet.time_embedding.linear_2.out_features

    def recompute(self, through: Callable[..., Any]) -> None:
        """See Network."""
        self.unet.enable_gradient_checkpointing(through)

    def forward(self, x_t: Tensor, t: Tensor, y: Text, cameras: Cameras | None = None) -> Tensor:
        """Predict eps or v of (B, 4, h, w) latents at (B,) timesteps given B texts; of x_t's dtype.

        XL's also wants the pooled text and its micro-conditioning (Podell et al. 2023, section 2.2): the size that the picture had,
        where it was cropped, and the size it has; a picture is told to have its own size and no crop.
        """
        unet, dtype, conditions = self.unet, dtype_of(self.unet), {}
        if unet.config.addition_embed_type == "text_time":
            assert y.pooled is not None, "an XL model needs pooled embeddings"
            height, width = (SDXL_LATENT_SCALE * side for side in x_t.shape[-2:])
            time_ids = _micro_conditioning(height, width, x_t.device).expand(len(x_t), -1)
            conditions = {"text_embeds": y.pooled.to(dtype), "time_ids": time_ids}
        seen_from = self._camera_labels(len(x_t), cameras)
        with self._given(y):
            prediction = unet(x_t.to(dtype), t, y.tokens.to(dtype), class_labels=seen_from, added_cond_kwargs=conditions).sample
        return prediction.to(x_t.dtype)  # before any difference is taken of it

    def use_compile(self, way: str) -> None:
        """Let it be compiled by one of COMPILES that is there."""
        self.compiled = way
        if way != "off":
            compile_regions(self.unet)

    def projected(self, y: Text) -> Text:
        """Return texts with the keys and values that this network makes of them."""
        return dataclasses.replace(y, projected=self._text_projections.of(y.tokens.to(dtype_of(self.unet))))

    def _camera_labels(self, count: int, cameras: Cameras | None) -> Tensor | None:
        """Return what the UNet is told of B cameras; nothing, it knows none."""

    def _given(self, y: Text) -> contextlib.AbstractContextManager[None]:
        if not self.takes_projected or y.projected is None:
            return contextlib.nullcontext()
        return self._text_projections.given(y.projected.to(dtype_of(self.unet)))


class StableDiffusionPrior:
    """A frozen latent diffusion model (see Prior).

    Attributes:
        network: the noise predictor; score/ injects phi's LoRA layers into it, switched off unless phi is asked.
        unet: diffusers' own, inside it.
        vae: between images and latents. XL's overflows in fp16: where its configuration says so (force_upcast), it stays in fp32.
        process: read from the pipeline's scheduler.
        image_size: of the images that encode() wants, pixels.
        latent_shape: (channels, h, w) of its x_0.
        scaling_factor: between the VAE's latents and x_0.
        attention: what computes the UNets' attention.
        compiled: how the UNets and the encoder are compiled.
    """

    knows_cameras, camera_is_guided, views_per_shot = False, True, 1
    attention, compiled = "sdpa", "off"
    network_class = DenoisingUnet

    def __init__(
        self, unet: UNet2DConditionModel, vae: AutoencoderKL, process: VariancePreserving, folder: PipelineFolder | None = None
    ) -> None:
        self.network, self.unet, self.vae, self.process, self.folder = self.network_class(unet, process), unet, vae, process, folder
        self.scaling_factor = vae.config.scaling_factor
        self.image_size = unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        self._repeat()

    @classmethod
    def load(cls, prior: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> StableDiffusionPrior:
        """Load UNet, VAE and process; text encoders are loaded by embed() alone.

        Args:
            prior: a name as find_pipeline() takes it.
            device: of the networks.
            dtype: of their weights; results have the dtype of what was given.

        Raises:
            ValueError: the prior is missing, incomplete, damaged or of another kind.
        """
        folder = find_pipeline(prior)
        unet = cls.load_unet(folder, dtype)
        vae = load_network(AutoencoderKL, folder, "vae", _vae_dtype(folder, dtype))
        return cls(placed(unet, device), placed(vae, device), _read_process(folder).to(device), folder)

    @classmethod
    def load_unet(cls, folder: PipelineFolder, dtype: torch.dtype) -> UNet2DConditionModel:
        """Load the UNet of a folder; ValueError if it is damaged, or scores another number of views together than this class."""
        if folder.views_per_shot != cls.views_per_shot:
            raise ValueError(
                f"prior {str(folder.path)!r} scores {folder.views_per_shot} view(s) together, {cls.views_per_shot} are wanted here: give a "
                "folder on this machine for several, and one of as many for phi"
            )
        return load_network(UNet2DConditionModel, folder, "unet", dtype)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.unet.parameters()).device

    @property
    def num_bytes(self) -> int:
        """Of UNet and VAE; phi's layers are not the prior's."""
        parameters = (p for net in (self.unet, self.vae) for name, p in net.named_parameters() if "lora_" not in name)
        return sum(p.numel() * p.element_size() for p in parameters)

    def encode(self, image: Tensor) -> Tensor:
        """Encode (B, 3, H, W) images in [0, 1] as (B, 4, h, w) latents, the posterior's means; gradient flows to the image."""
        if image.shape[-1] != self.image_size:
            image = nn.functional.interpolate(image, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        mean = self._means((2 * image - 1).to(dtype_of(self.vae)))
        return mean.to(image.dtype) * self.scaling_factor

    def decode(self, x_0: Tensor) -> Tensor:
        """Decode (B, 4, h, w) latents to (B, 3, H, W) images in [0, 1]."""
        image = self.vae.decode((x_0 / self.scaling_factor).to(dtype_of(self.vae))).sample
        return (image.to(x_0.dtype) / 2 + 0.5).clamp(0, 1)

    def predict(self, x_t: Tensor, t: Tensor, y: Text, cameras: Cameras | None = None) -> Tensor:
        """See DenoisingUnet."""
        if hasattr(next(self.unet.parameters()), "ds_id"):  # ZeRO 3 gathers the weights in the modules' hooks
            return self.network(x_t, t, y, cameras)
        seen_from = () if cameras is None or not self.knows_cameras else cameras.tensors()
        return self._predicted(x_t, t, *y.fields, *seen_from)

    def use_attention(self, attention: str) -> None:
        """Let the UNet, and those of network_of(), attend by a back end of attention_names.ATTENTIONS that is there."""
        self.attention = attention
        use_attention(self.unet, attention, self.views_per_shot)
        self._repeat()

    def use_compile(self, way: str) -> None:
        """Compile the encoder, the UNet, and those of network_of(), by one of compile_names.COMPILES that is there."""
        self.compiled = way
        self.network.use_compile(way)
        if way != "off":
            compile_regions(self.vae.encoder)
        self._repeat()

    def _repeat(self) -> None:
        def predict(x_t: Tensor, t: Tensor, *given: Tensor) -> Tensor:
            return self.network(x_t, t, Text(*given[:NUM_FIELDS]), Cameras.of_tensors(given[NUM_FIELDS:]))

        self._predicted = repeated(predict, self.compiled)
        self._means = repeated(lambda image: self.vae.encode(image).latent_dist.mean, self.compiled)

    def network_of(self, name: str) -> DenoisingUnet:
        """Load another checkpoint's UNet and process alone, for a phi that does not sit on this one's.

        Args:
            name: as find_pipeline() takes it.

        Raises:
            ValueError: the prior can't be used, or does not fit this one (see check_unet_fits).
        """
        folder = find_pipeline(name)
        if self.folder is not None:
            check_unet_fits(folder, self.folder)
        unet = self.load_unet(folder, dtype_of(self.unet))
        return self._of_phi(placed(unet, self.device), _read_process(folder).to(self.device))

    def _of_phi(self, unet: UNet2DConditionModel, process: VariancePreserving) -> DenoisingUnet:
        """Return a network of phi's own, computed as this one."""
        use_attention(unet, self.attention, self.views_per_shot)
        network = self.network_class(unet, process, takes_projected=False)
        network.use_compile(self.compiled)
        return network

    def embed(self, prompts: list[str], negative_prompt: str = "") -> TextEmbeddings:
        """Embed prompts, from the cache or by the text encoders (see embed_texts).

        Args:
            prompts: B texts.
            negative_prompt: of the unconditional branch. Where the pipeline says so, as XL's does, the empty one is all zeros.

        Raises:
            ValueError: a text has words that the prior does not know, or more tokens than its text encoders take.
        """
        folder = self.folder
        if folder is None:
            raise ValueError("this prior was built without a pipeline folder: give text embeddings directly")
        rows = embed_texts(folder, [*prompts, negative_prompt], self.device)
        uncond = rows[-1:]
        if folder.zeros_for_empty_prompt and not negative_prompt:
            uncond = Text(torch.zeros_like(uncond.tokens), None if uncond.pooled is None else torch.zeros_like(uncond.pooled))
        rows = self.network.projected(Text.cat([rows[:-1], uncond]))
        return TextEmbeddings(rows[:-1], rows[-1:].expand(len(prompts)))


@functools.cache
def _micro_conditioning(height: int, width: int, device: torch.device) -> Tensor:
    """Return what XL is told of a picture, (6,) on the device: brought there once and not in every pass."""
    return torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=device)


def check_unet_fits(folder: PipelineFolder, teacher: PipelineFolder) -> None:
    """Refuse a UNet of other latents, texts or noise levels than the teacher's; what it predicts, eps or v, may differ.

    Raises:
        ValueError: naming what differs.
    """
    if folder.kind in FLOWS:
        raise ValueError(
            f"phi's prior {str(folder.path)!r} is a rectified flow ({FLOWS[folder.kind].title}), the teacher is none: choose another "
            "--score.prior"
        )
    one, other = (_what_unets_share(pipeline) for pipeline in (folder, teacher))
    for name, value in one.items():
        if value != other[name]:
            raise ValueError(
                f"phi's prior {str(folder.single_file or folder.path)!r} does not fit the teacher: its {name} is {value}, "
                f"the teacher's {other[name]}; choose one that shares it"
            )
    mine, theirs = (_read_process(pipeline).alphas_cumprod for pipeline in (folder, teacher))
    if mine.shape != theirs.shape or not torch.allclose(mine, theirs, rtol=0, atol=1e-4):
        raise ValueError(
            f"phi's prior {str(folder.single_file or folder.path)!r} does not fit the teacher: its noise schedule (alphas_cumprod) is "
            "another; choose one that shares it"
        )


def _what_unets_share(folder: PipelineFolder) -> dict[str, object]:
    unet, vae = folder.unet_settings, read_json(folder.path / "vae" / "config.json", str(folder.path))
    return {name: unet.get(name) for name in SHARED_BY_UNETS} | {"scaling_factor": vae.get("scaling_factor", 0.18215)}


def _vae_dtype(folder: PipelineFolder, dtype: torch.dtype) -> torch.dtype:
    overflows = read_json(folder.path / "vae" / "config.json", str(folder.path)).get("force_upcast", True)
    return torch.float32 if dtype == torch.float16 and folder.kind == STABLE_DIFFUSION_XL and overflows else dtype


def _read_process(folder: PipelineFolder) -> VariancePreserving:
    return VariancePreserving.from_scheduler_config(read_json(folder.path / "scheduler" / "scheduler_config.json", str(folder.path)))
