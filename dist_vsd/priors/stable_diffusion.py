"""Stable Diffusion, or anything laid out like it, as a frozen prior; the embedded prior is loaded by the same lines."""

from __future__ import annotations

import json

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from dist_vsd.diffusion.schedule import NoiseSchedule
from dist_vsd.priors.pipeline_folder import PipelineFolder, check_vocabulary, find_pipeline
from dist_vsd.priors.prior import TextEmbeddings


class StableDiffusionPrior:
    """A frozen latent diffusion model.

    Attributes:
        unet: the noise predictor; score/ injects phi's LoRA layers into it, switched off unless phi is asked.
        vae: between images and latents.
        schedule: the noise schedule.
        image_size: of the images that encode() wants, pixels.
        scaling_factor: between the VAE's latents and x_0.
    """

    def __init__(
        self, unet: UNet2DConditionModel, vae: AutoencoderKL, schedule: NoiseSchedule, folder: PipelineFolder | None = None
    ) -> None:
        self.unet, self.vae, self.schedule, self.folder = unet, vae, schedule, folder
        self.scaling_factor = vae.config.scaling_factor
        self.image_size = unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)

    @staticmethod
    def load(prior: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> StableDiffusionPrior:
        """Load UNet, VAE and schedule; the text encoder is loaded by embed() alone.

        Args:
            prior: "embedded", the path of a StableDiffusionPipeline folder, or a hub id.
            device: of the networks.
            dtype: of their weights; results have the dtype of what was given.

        Raises:
            ValueError: the prior is missing, incomplete, damaged or of another kind.
        """
        folder = find_pipeline(prior)
        unet = _load_component(UNet2DConditionModel, folder, "unet", dtype)
        vae = _load_component(AutoencoderKL, folder, "vae", dtype)
        scheduler = json.loads((folder.path / "scheduler" / "scheduler_config.json").read_text())
        for network in (unet, vae):
            network.requires_grad_(False).eval().to(device)
        return StableDiffusionPrior(unet, vae, NoiseSchedule.from_scheduler_config(scheduler).to(device), folder)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.device

    def encode(self, image: Tensor) -> Tensor:
        """Encode (B, 3, H, W) images in [0, 1] as (B, 4, h, w) latents, the posterior's means; gradient flows to the image."""
        if image.shape[-1] != self.image_size:
            image = nn.functional.interpolate(image, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        mean = self.vae.encode((2 * image - 1).to(self.vae.dtype)).latent_dist.mean
        return mean.to(image.dtype) * self.scaling_factor

    def decode(self, x_0: Tensor) -> Tensor:
        """Decode (B, 4, h, w) latents to (B, 3, H, W) images in [0, 1]."""
        image = self.vae.decode((x_0 / self.scaling_factor).to(self.vae.dtype)).sample
        return (image.to(x_0.dtype) / 2 + 0.5).clamp(0, 1)

    def eps(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise in (B, 4, h, w) latents at (B,) timesteps given (B, num_tokens, width) embeddings; of x_t's dtype."""
        prediction = self.unet(x_t.to(self.unet.dtype), t, y.to(self.unet.dtype)).sample
        return self.schedule.eps_from_prediction(prediction.to(x_t.dtype), x_t, t)

    def embed(self, prompts: list[str], negative_prompt: str = "") -> TextEmbeddings:
        """Embed prompts; the text encoder is loaded for it and freed again.

        Args:
            prompts: B texts.
            negative_prompt: of the unconditional branch.

        Raises:
            ValueError: the prior has a closed vocabulary and a prompt has other words.
        """
        folder = self.folder
        if folder is None:
            raise ValueError("this prior was built without a pipeline folder: give text embeddings directly")
        check_vocabulary([*prompts, negative_prompt], folder)
        tokenizer = CLIPTokenizer.from_pretrained(folder.path / "tokenizer")
        text_encoder = _load_component(CLIPTextModel, folder, "text_encoder", torch.float32)
        text_encoder.requires_grad_(False).eval().to(self.device)
        texts = [*prompts, negative_prompt]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(self.device)
        with torch.no_grad():
            embeddings = text_encoder(tokens)[0]
        uncond = embeddings[-1:].expand(len(prompts), -1, -1)
        return TextEmbeddings(embeddings[:-1].clone(), uncond.clone())


def _load_component(kind: type, folder: PipelineFolder, component: str, dtype: torch.dtype) -> nn.Module:
    try:
        network, loading = kind.from_pretrained(
            folder.path / component,
            use_safetensors=True,
            local_files_only=True,
            variant=folder.variants[component],
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"prior {str(folder.path)!r} is damaged: its {component} can't be loaded ({reason}); copy it anew") from error
    # A tensor that the file lacks would be left at random values.
    absent = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if absent:
        raise ValueError(
            f"prior {str(folder.path)!r} is damaged: its {component} lacks {len(absent)} tensor(s), {absent[0]} first; copy it anew"
        )
    # The argument for it is called torch_dtype or dtype, by version; diffusers warns of every cast, needed or not.
    return network if network.dtype == dtype else network.to(dtype)
