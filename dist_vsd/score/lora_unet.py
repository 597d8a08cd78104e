"""eps_phi(x_t, t, c, y): the prior's own UNet with LoRA layers and a camera embedding. There is no second UNet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dist_vsd.diffusion.schedule import NoiseSchedule
from dist_vsd.score.camera_embedding import CameraEmbedding
from dist_vsd.score.score_config import ScoreConfig

ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
ADAPTER = "phi"


class LoraScore(nn.Module):
    """eps_phi on the UNet of a prior.

    The adapters stay switched on; whoever asks the pretrained model does it inside ``pretrained()``. While the LoRA's up
    matrices and the camera embedding's last layer are zero, eps_phi equals eps_pretrain to the bit.

    Args:
        unet: the prior's; LoRA layers are injected in place, its own weights stay frozen.
        schedule: the prior's.
        config: rank of the LoRA.
        generator: draws the LoRA's down matrices and the camera embedding, on the CPU.
    """

    def __init__(
        self, unet: UNet2DConditionModel, schedule: NoiseSchedule, config: ScoreConfig, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.schedule = schedule
        lora = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=list(ATTENTION_PROJECTIONS))
        self.unet = inject_adapter_in_model(lora, unet, adapter_name=ADAPTER)
        self._adapted = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
        for layer in self._adapted:
            down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            down.float(), up.float()
            with torch.no_grad():
                down.weight.copy_(torch.randn(down.weight.shape, generator=generator) / config.rank)
                up.weight.zero_()
        self.camera_embedding = CameraEmbedding(unet.time_embedding.linear_2.out_features, generator).to(unet.device)
        self._offset: Tensor | None = None
        unet.time_embedding.register_forward_hook(self._add_offset)

    def _add_offset(self, _module: nn.Module, _inputs: Any, time_embedding: Tensor) -> Tensor:
        return time_embedding if self._offset is None else time_embedding + self._offset.to(time_embedding.dtype)

    @contextlib.contextmanager
    def pretrained(self) -> Iterator[None]:
        """Switch the adapters off inside a ``with``: the UNet is the frozen prior's."""
        for layer in self._adapted:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._adapted:
                layer.enable_adapters(True)

    def phi(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name: the LoRA matrices and the camera embedding."""
        return {name: p for name, p in self.named_parameters() if "lora_" in name or name.startswith("camera_embedding.")}

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, c2w: Tensor) -> Tensor:
        """Predict the noise in renders of the particles.

        Args:
            x_t: (B, 4, h, w) noised renders.
            t: (B,) integer timesteps.
            y: (B, num_tokens, width) embeddings of the prompt without view words.
            c2w: (B, 4, 4) poses; zeros where the pose is dropped.

        Returns:
            eps_phi, (B, 4, h, w), of x_t's dtype; the gradient flows to phi and x_t.
        """
        self._offset = self.camera_embedding(c2w)
        try:
            prediction = self.unet(x_t.to(self.unet.dtype), t, y.to(self.unet.dtype)).sample
        finally:
            self._offset = None
        return self.schedule.eps_from_prediction(prediction.to(x_t.dtype), x_t, t)
