"""Priors that score the four views of a shot together: a Stable Diffusion's UNet that is told the cameras and attends over the views.

MVDream's construction (Shi et al. 2023, section 3): the pose of each view through an MLP into the time embedding, self-attention over all
tokens of a group of views with the weights of a single view's, cross-attention to the text as before. Here the MLP is the UNet's
``class_embedding`` (class_embed_type "projection"), so that the folder is one of diffusers'; that its views belong together is said by
``views_per_shot`` in the folder's dist_vsd.json.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.diffusion.process import VariancePreserving
from dist_vsd.priors.attention import use_attention
from dist_vsd.priors.camera_pose import camera_pose
from dist_vsd.priors.pipeline_folder import POSE_WIDTH, VIEWS_TOGETHER, PipelineFolder
from dist_vsd.priors.stable_diffusion import DenoisingUnet, StableDiffusionPrior, dtype_of


class MultiViewUnet(DenoisingUnet):
    """A UNet whose rows are groups of VIEWS_TOGETHER views, as a Network (see priors/prior.py)."""

    def _camera_labels(self, count: int, cameras: Cameras | None) -> Tensor:
        """Return (B, POSE_WIDTH) poses of the cameras; zeros, as a dropped camera's, where there are none."""
        assert count % VIEWS_TOGETHER == 0, f"{count} rows are no groups of {VIEWS_TOGETHER} views"
        weight = self.unet.class_embedding.linear_1.weight
        if cameras is None:
            return torch.zeros(count, POSE_WIDTH, dtype=weight.dtype, device=weight.device)
        return camera_pose(cameras).to(dtype_of(self.unet))


class MultiViewPrior(StableDiffusionPrior):
    """A frozen latent diffusion model of four views (see Prior, and StableDiffusionPrior for the attributes)."""

    knows_cameras, views_per_shot = True, VIEWS_TOGETHER
    network_class = MultiViewUnet

    def __init__(
        self, unet: UNet2DConditionModel, vae: AutoencoderKL, process: VariancePreserving, folder: PipelineFolder | None = None
    ) -> None:
        super().__init__(unet, vae, process, folder)
        use_attention(unet, self.attention, self.views_per_shot)
