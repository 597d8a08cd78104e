"""eps_phi(x_t, t, c, y): a prior's network, by default the very same one, with LoRA layers and a camera embedding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_vsd.cameras import Cameras
from dist_vsd.priors.compiled import repeated
from dist_vsd.priors.lora_targets import require_targets
from dist_vsd.priors.prior import NUM_FIELDS, Network, Text
from dist_vsd.score.camera_embedding import POSE_WIDTHS, CameraEmbedding
from dist_vsd.score.lora_layer import CastLoraConv2d, CastLoraLinear, CastOnce
from dist_vsd.score.score_config import ScoreConfig

ADAPTER = "phi"


class LoraScore(nn.Module):
    """eps_phi on a prior's network.

    phi never changes the prior: the adapters are on inside a call of eps_phi alone, so that whoever asks the network otherwise asks
    the pretrained model. While the LoRA's up matrices and the camera embedding's last layer are zero, eps_phi equals it to the bit.

    Attributes:
        casts_once: whether LoRA computes in the precision of a bf16 or fp16 network, its matrices cast once a pass; else in fp32.

    Args:
        network: the prior's, or one of its own; LoRA layers are injected in place, its weights stay frozen.
        config: rank and alpha of the LoRA, kind of the pose.
        generator: draws the LoRA's down matrices and the camera embedding, on the CPU.
    """

    def __init__(self, network: Network, config: ScoreConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.process, self.casts_once = network.process, True
        lora = LoraConfig(r=config.rank, lora_alpha=config.alpha or config.rank, target_modules=_layers_of(network, config))
        self.network = inject_adapter_in_model(lora, network, adapter_name=ADAPTER)
        self._adapted = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
        for layer in self._adapted:
            layer.__class__ = CastLoraConv2d if isinstance(layer.get_base_layer(), nn.Conv2d) else CastLoraLinear
            down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            down.float(), up.float()
            side = math.sqrt(down.weight[0, 0].numel())  # of a kernel: the sum over its places is as large as a linear layer's
            with torch.no_grad():
                down.weight.copy_(torch.randn(down.weight.shape, generator=generator) / (config.rank * side))
                up.weight.zero_()
        self._switch(on=False)
        self._recomputes = config.recompute
        if config.recompute:
            network.recompute(self._through_block)
        num_inputs, device = POSE_WIDTHS[config.camera], next(network.parameters()).device
        self.camera_embedding = CameraEmbedding(num_inputs, network.time_width, generator).to(device) if num_inputs else None
        self._offset: Tensor | None = None
        network.time_embedding.register_forward_hook(self._add_offset)
        def ask(x_t: Tensor, t: Tensor, pose: Tensor, *given: Tensor) -> Tensor:
            return self._ask(x_t, t, Text(*given[:NUM_FIELDS]), pose, Cameras.of_tensors(given[NUM_FIELDS:]))

        self._repeated = repeated(ask, network.compiled)

    def _add_offset(self, _module: nn.Module, _inputs: Any, time_embedding: Tensor) -> Tensor:
        return time_embedding if self._offset is None else time_embedding + self._offset.to(time_embedding.dtype)

    def _switch(self, on: bool) -> None:
        """Switch the adapters; peft's own enable_adapters() would take requires_grad from them, and gradients with it."""
        for layer in self._adapted:
            layer._disable_adapters = not on

    def _through_block(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """Call a block whose activations are computed again in the backward pass, when phi's own call is long over: as in that call."""
        matrices = [layer.matrices for layer in self._adapted]

        def as_phi(*again: Any) -> Any:
            before = [(layer._disable_adapters, layer.matrices) for layer in self._adapted]
            for layer, own in zip(self._adapted, matrices, strict=True):
                layer._disable_adapters, layer.matrices = False, own
            try:
                return block(*again)
            finally:
                for layer, (is_off, others) in zip(self._adapted, before, strict=True):
                    layer._disable_adapters, layer.matrices = is_off, others

        return checkpoint(as_phi, *inputs, use_reentrant=False, preserve_rng_state=False)

    def _cast_matrices(self) -> None:
        """Give the layers their matrices, in the network's precision, for one pass; not under ZeRO 3, which gathers them in hooks."""
        pairs = [(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight) for layer in self._adapted]
        dtype = self._adapted[0].get_base_layer().weight.dtype
        if not self.casts_once or hasattr(pairs[0][0], "ds_id"):
            return
        matrices = [matrix for pair in pairs for matrix in pair]
        casts = matrices if dtype == matrices[0].dtype else CastOnce.apply(dtype, *matrices)
        for layer, down, up in zip(self._adapted, casts[::2], casts[1::2], strict=True):
            layer.matrices = (down, up)

    def phi(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name: the LoRA matrices and the camera embedding."""
        return {name: p for name, p in self.named_parameters() if "lora_" in name or name.startswith("camera_embedding.")}

    def forward(self, x_t: Tensor, t: Tensor, y: Text, pose: Tensor, cameras: Cameras | None = None) -> Tensor:
        """Return what the network predicts of noised renders of the particles, which ``process.eps`` turns into eps_phi.

        Args:
            x_t: (B, ...) noised renders.
            t: (B,) times of the process.
            y: B texts, without view words.
            pose: (B, P) of pose_of(); zeros where the pose is dropped.
            cameras: B, for a network that knows cameras itself.

        Returns:
            Like x_t; the gradient flows to phi and x_t.
        """
        if self._can_be_repeated():
            return self._repeated(x_t, t, pose, *y.fields, *(() if cameras is None else cameras.tensors()))
        return self._ask(x_t, t, y, pose, cameras)

    def _can_be_repeated(self) -> bool:
        """Say whether a pass calls the same operations on the same tensors every time: not where ZeRO 3 shards them.

        A graph has casts and recomputed blocks in it; what replays operations has not.
        """
        matrix = self._adapted[0].lora_A[ADAPTER].weight
        if not self.network.can_be_replayed or hasattr(matrix, "ds_id"):
            return False
        if self.network.compiled == "graphs":
            return True
        return self._adapted[0].get_base_layer().weight.dtype == matrix.dtype and not self._recomputes

    def _ask(self, x_t: Tensor, t: Tensor, y: Text, pose: Tensor, cameras: Cameras | None) -> Tensor:
        self._offset = self.camera_embedding(pose) if self.camera_embedding is not None else None
        self._switch(on=True)
        self._cast_matrices()
        try:
            return self.network(x_t, t, y, cameras)
        finally:
            self._switch(on=False)
            self._offset = None
            for layer in self._adapted:
                layer.matrices = None


def _layers_of(network: Network, config: ScoreConfig) -> list[str]:
    """Return the names of the layers beside which LoRA is to stand; ValueError for a target that the network lacks."""
    require_targets(config.targets, network.adapted)
    return [name for target in config.targets for name in network.adapted[target]]
