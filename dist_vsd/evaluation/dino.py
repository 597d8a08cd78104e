"""How alike pictures are by DINO: self-supervised features, which tell poses and parts apart that a caption does not."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

KINDS = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
PICTURES_AT_ONCE = 64


class DinoEncoder:
    """A frozen DINO (Caron et al. 2021), DINOv2 or DINOv3, from a folder of the transformers library.

    Args:
        model: the network.
        mean, std: by which pictures are normalised.
        size: height and width that it is given.
    """

    def __init__(self, model: PreTrainedModel, mean: list[float], std: list[float], size: int) -> None:
        self.model, self.size = model.requires_grad_(False).eval(), size
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    @staticmethod
    def load(folder: Path, device: torch.device | str = "cpu") -> DinoEncoder:
        """Load a folder in safetensors.

        Raises:
            ValueError: it is missing, incomplete, damaged, or of another kind.
        """
        try:
            kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
            if kind not in KINDS:
                raise ValueError(f"it is a {kind}, not one of {', '.join(KINDS)}")
            model = AutoModel.from_pretrained(folder, use_safetensors=True, local_files_only=True).float()
            settings = json.loads((folder / "preprocessor_config.json").read_text())
            size = settings.get("crop_size", settings["size"])
            height = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
            encoder = DinoEncoder(model.to(device), settings["image_mean"], settings["image_std"], int(height))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise ValueError(f"DINO folder {folder} can't be loaded ({type(error).__name__}: {reason}): copy it anew") from error
        return encoder

    @torch.no_grad()
    def embed(self, pictures: Tensor) -> Tensor:
        """Return (..., D) unit vectors, the class token's, of (..., 3, H, W) pictures in [0, 1]."""
        rows = []
        for chunk in pictures.flatten(0, -4).split(PICTURES_AT_ONCE):
            resized = nn.functional.interpolate(chunk.to(self.model.device), (self.size, self.size), mode="bicubic", antialias=True)
            normalized = (resized - self.mean.to(resized)) / self.std.to(resized)
            rows.append(self.model(pixel_values=normalized).last_hidden_state[:, 0])
        return nn.functional.normalize(torch.cat(rows), dim=-1).unflatten(0, pictures.shape[:-3])
