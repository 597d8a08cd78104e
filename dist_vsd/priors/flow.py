"""Rectified flows of diffusers as frozen priors: Stable Diffusion 3 and 3.5, FLUX-dev and SANA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import diffusers
import torch
from torch import Tensor, nn

from dist_vsd.cameras import Cameras
from dist_vsd.diffusion.process import RectifiedFlow
from dist_vsd.priors.compiled import repeated
from dist_vsd.priors.flow_check import check_flow_fits, flow_sizes
from dist_vsd.priors.flow_config import AS_IT_IS, FlowConfig
from dist_vsd.priors.flow_folder import flow_shift
from dist_vsd.priors.flow_network import FlowNetwork
from dist_vsd.priors.flux import FluxNetwork
from dist_vsd.priors.networks import dtype_of, load_network, placed
from dist_vsd.priors.pipeline_folder import find_pipeline
from dist_vsd.priors.pipeline_kinds import FLOWS, FLUX, SANA, STABLE_DIFFUSION_3, PipelineFolder
from dist_vsd.priors.prior import Text, TextEmbeddings
from dist_vsd.priors.sana import SanaNetwork
from dist_vsd.priors.stable_diffusion_3 import StableDiffusion3Network
from dist_vsd.priors.text_encoder import embed_texts

if TYPE_CHECKING:
    from diffusers import AutoencoderDC, AutoencoderKL

NETWORKS: dict[str, type[FlowNetwork]] = {STABLE_DIFFUSION_3: StableDiffusion3Network, FLUX: FluxNetwork, SANA: SanaNetwork}
USUAL_GUIDANCE_EMBEDDING = 3.5  # that FLUX-dev's pipeline tells it


class FlowPrior:
    """A frozen latent rectified flow (see Prior).

    Attributes:
        network: predicts the velocity; score/ injects phi's LoRA layers into it, switched off unless phi is asked.
        vae: between images and latents.
        process: with the shift of the pipeline's scheduler, or the one that is asked for.
        image_size: of the images that encode() wants, pixels.
        latent_shape: (channels, h, w) of its x_0.
        scaling_factor, shift_factor: x_0 = (z - shift_factor) scaling_factor of the VAE's latents z.
        guidance_embedding: the scale that the network is told, if it was distilled from guidance; else None.
    """

    knows_cameras, camera_is_guided, views_per_shot = False, True, 1

    def __init__(
        self,
        network: FlowNetwork,
        vae: AutoencoderKL | AutoencoderDC,
        image_size: int,
        folder: PipelineFolder | None = None,
        guidance_embedding: float | None = None,
    ) -> None:
        self.network, self.vae, self.folder = network, vae, folder
        self.process, self.transformer = network.process, network.transformer
        self.scaling_factor, self.shift_factor = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
        self.image_size, side = image_size, image_size // shrinks(vae)
        self.latent_shape = (vae.config.latent_channels, side, side)
        usual = USUAL_GUIDANCE_EMBEDDING if guidance_embedding is None else guidance_embedding
        self.guidance_embedding = usual if network.has_guidance_embedding else None

        def predict(x_t: Tensor, t: Tensor, *text: Tensor) -> Tensor:
            return self.network(x_t, t, Text(*text), None, self.guidance_embedding)

        self._predicted = repeated(predict, network.compiled)
        self._encoded = repeated(self._means, network.compiled)

    @classmethod
    def load(
        cls,
        prior: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        flow: FlowConfig = AS_IT_IS,
    ) -> FlowPrior:
        """Load transformer, VAE and process; text encoders are loaded by embed() alone.

        Args:
            prior: a name as find_pipeline() takes it.
            device: of the networks.
            dtype: of their weights; results have the dtype of what was given. A VAE that overflows in fp16 stays in fp32 there.
            flow: what is asked of it beside its own settings.

        Raises:
            ValueError: the prior is missing, incomplete, damaged or of another kind, or can't do what is asked.
        """
        folder = find_pipeline(prior)
        image_size, num_tokens = flow_sizes(folder, flow)
        network = load_flow_network(folder, RectifiedFlow(flow.shift or flow_shift(folder, num_tokens)), dtype)
        overflows = dtype == torch.float16 and folder.config("vae").get("force_upcast", True)
        vae = load_network(getattr(diffusers, FLOWS[folder.kind].vae), folder, "vae", torch.float32 if overflows else dtype)
        return cls(network.to(device), placed(vae, device), image_size, folder, flow.guidance_embedding)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.transformer.parameters()).device

    @property
    def num_bytes(self) -> int:
        """Of transformer and VAE; phi's layers are not the prior's."""
        parameters = (p for net in (self.transformer, self.vae) for name, p in net.named_parameters() if "lora_" not in name)
        return sum(p.numel() * p.element_size() for p in parameters)

    def encode(self, image: Tensor) -> Tensor:
        """Encode (B, 3, H, W) images in [0, 1] as (B, C, h, w) latents, the posterior's means; gradient flows to the image."""
        if image.shape[-1] != self.image_size:
            image = nn.functional.interpolate(image, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        mean = self._encoded((2 * image - 1).to(dtype_of(self.vae)))
        return (mean.to(image.dtype) - self.shift_factor) * self.scaling_factor

    def decode(self, x_0: Tensor) -> Tensor:
        """Decode (B, C, h, w) latents to (B, 3, H, W) images in [0, 1]."""
        image = self.vae.decode((x_0 / self.scaling_factor + self.shift_factor).to(dtype_of(self.vae))).sample
        return (image.to(x_0.dtype) / 2 + 0.5).clamp(0, 1)

    def predict(self, x_t: Tensor, t: Tensor, y: Text, cameras: Cameras | None = None) -> Tensor:
        """See Prior: the velocity."""
        if hasattr(next(self.transformer.parameters()), "ds_id"):  # ZeRO 3 gathers the weights in the modules' hooks
            return self.network(x_t, t, y, None, self.guidance_embedding)
        return self._predicted(x_t, t, *y.fields)

    def network_of(self, name: str) -> FlowNetwork:
        """Load another checkpoint's transformer alone, for a phi that does not sit on this one's.

        Args:
            name: as find_pipeline() takes it.

        Raises:
            ValueError: the prior can't be used, or does not fit this one (see check_flow_fits).
        """
        folder = find_pipeline(name)
        if self.folder is not None:
            check_flow_fits(folder, self.folder)
        return load_flow_network(folder, self.process, dtype_of(self.transformer)).to(self.device)

    def embed(self, prompts: list[str], negative_prompt: str = "") -> TextEmbeddings:
        """Embed prompts, from the cache or by the text encoders (see embed_texts).

        Args:
            prompts: B texts.
            negative_prompt: of the unconditional branch.

        Raises:
            ValueError: a text has words that the prior does not know, or more tokens than its text encoders take.
        """
        if self.folder is None:
            raise ValueError("this prior was built without a pipeline folder: give text embeddings directly")
        rows = embed_texts(self.folder, prompts, self.device, [negative_prompt])
        return TextEmbeddings(rows[:-1], rows[-1:].expand(len(prompts)))

    def _means(self, image: Tensor) -> Tensor:
        encoded = self.vae.encode(image)
        return encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mean  # AutoencoderDC has no distribution


def load_flow_network(folder: PipelineFolder, process: RectifiedFlow, dtype: torch.dtype) -> FlowNetwork:
    """Load the transformer of a checked folder as a network, on the CPU; ValueError if it is damaged."""
    transformer = load_network(getattr(diffusers, FLOWS[folder.kind].transformer), folder, "transformer", dtype)
    return NETWORKS[folder.kind](transformer, process)


def shrinks(vae: AutoencoderKL | AutoencoderDC) -> int:
    """Return how many pixels of a picture's side a latent stands for."""
    return 2 ** (len(vae.config.get("block_out_channels") or vae.config.encoder_block_out_channels) - 1)
