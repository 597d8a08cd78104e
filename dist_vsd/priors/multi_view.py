"""Priors that score the four views of a shot together: a Stable Diffusion's UNet that is told the cameras and attends over the views.

MVDream's construction (Shi et al. 2023, section 3): the pose of each view through an MLP into the time embedding, self-attention over all
tokens of a group of views with the weights of a single view's, cross-attention to the text as before. Here the MLP is the UNet's
``class_embedding`` (class_embed_type "projection"), so that the folder is one of diffusers'; that its views belong together is said by
``views_per_shot`` in the folder's dist_vsd.json.
"""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.diffusion.process import VariancePreserving
from dist_vsd.priors.attention import use_attention
from dist_vsd.priors.camera_pose import MVDREAM_WORLD, camera_pose
from dist_vsd.priors.networks import dtype_of
from dist_vsd.priors.pipeline_folder import MVDREAM, POSE_WIDTH, VIEWS_TOGETHER, PipelineFolder, find_pipeline
from dist_vsd.priors.stable_diffusion import DenoisingUnet, StableDiffusionPrior
from dist_vsd.serialization import read_tensors


class MultiViewUnet(DenoisingUnet):
    """A UNet whose rows are groups of VIEWS_TOGETHER views, as a Network (see priors/prior.py).

    Attributes:
        world: (4, 4) from this program's world to the one of its training; None: the same.
    """

    world: Tensor | None = None

    def _camera_labels(self, count: int, cameras: Cameras | None) -> Tensor:
        """Return (B, POSE_WIDTH) poses of the cameras; zeros, as a dropped camera's, where there are none."""
        assert count % VIEWS_TOGETHER == 0, f"{count} rows are no groups of {VIEWS_TOGETHER} views"
        weight = self.unet.class_embedding.linear_1.weight
        if cameras is None:
            return torch.zeros(count, POSE_WIDTH, dtype=weight.dtype, device=weight.device)
        return camera_pose(cameras, self.world).to(dtype_of(self.unet))


class MultiViewPrior(StableDiffusionPrior):
    """A frozen latent diffusion model of four views (see Prior, and StableDiffusionPrior for the attributes)."""

    knows_cameras, views_per_shot = True, VIEWS_TOGETHER
    network_class = MultiViewUnet

    def __init__(
        self, unet: UNet2DConditionModel, vae: AutoencoderKL, process: VariancePreserving, folder: PipelineFolder | None = None
    ) -> None:
        super().__init__(unet, vae, process, folder)
        use_attention(unet, self.attention, self.views_per_shot)
        if folder is not None and folder.kind == MVDREAM:
            self.camera_is_guided = False  # MVDream's own guidance tells both branches the camera
            self.network.world = torch.tensor(MVDREAM_WORLD, device=self.device)

    @classmethod
    def load_unet(cls, folder: PipelineFolder, dtype: torch.dtype) -> UNet2DConditionModel:
        """Load a UNet of this class's number of views, from diffusers' layout or MVDream's; ValueError if it is damaged or another."""
        return load_mvdream_unet(folder, dtype) if folder.kind == MVDREAM else super().load_unet(folder, dtype)

    def network_of(self, name: str) -> DenoisingUnet:
        """See StableDiffusionPrior; in the world of its own training."""
        network = super().network_of(name)
        network.world = torch.tensor(MVDREAM_WORLD, device=self.device) if find_pipeline(name).kind == MVDREAM else None
        return network


def load_mvdream_unet(folder: PipelineFolder, dtype: torch.dtype) -> UNet2DConditionModel:
    """Load MVDream's UNet as one of diffusers, by diffusers' own conversion of the original names.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    settings, tensors = folder.unet_settings, {}
    for file in folder.files("unet"):
        tensors |= {f"model.diffusion_model.{_ldm_name(name)}": tensor.to(dtype) for name, tensor in read_tensors(file).items()}
    with init_empty_weights():
        unet = UNet2DConditionModel(**settings)
    try:
        unet.load_state_dict(convert_ldm_unet_checkpoint(tensors, config=settings), strict=False, assign=True)
    except (RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"prior {str(folder.path)!r} is damaged: its unet can't be loaded ({reason}); copy it anew") from error
    absent = sorted(name for name, parameter in unet.named_parameters() if parameter.is_meta)
    if absent:
        raise ValueError(f"prior {str(folder.path)!r} is damaged: its unet lacks {len(absent)} tensor(s), {absent[0]} first; copy it anew")
    return unet.requires_grad_(False).eval()


def _ldm_name(name: str) -> str:
    """Return the original layout's name of a condition that is added to the time embedding, for MVDream's camera."""
    return name.replace("camera_embed.", "label_emb.0.", 1) if name.startswith("camera_embed.") else name
