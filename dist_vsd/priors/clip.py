"""CLIP models: which of some texts fits a picture best, and how well."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from dist_vsd.priors.clip_folder import EMBEDDED_CLIP_FOLDER


class ClipScorer:
    """A frozen CLIP that compares pictures with texts.

    Args:
        model: the CLIP.
        tokenizer: its tokenizer.
        mean, std: (3,) moments by which its pictures are normalised.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.model, self.tokenizer = model.requires_grad_(False).eval(), tokenizer
        self.mean, self.std = (torch.tensor(moment, device=model.device)[:, None, None] for moment in (mean, std))
        self.image_size = model.config.vision_config.image_size

    @staticmethod
    def load(folder: Path = EMBEDDED_CLIP_FOLDER, device: torch.device | str = "cpu") -> ClipScorer:
        """Load the embedded CLIP, or any CLIPModel folder in safetensors.

        Raises:
            ValueError: the folder is missing, incomplete or damaged.
        """
        try:
            model = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True).float()
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            moments = json.loads((folder / "preprocessor_config.json").read_text())
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"CLIP folder {folder} can't be loaded ({type(error).__name__}): copy it anew") from error
        return ClipScorer(model.to(device), tokenizer, moments["image_mean"], moments["image_std"])

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Return (B, D) unit vectors of B texts."""
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return _unit(self.model.get_text_features(tokens.to(self.model.device)))

    def embed_images(self, images: Tensor) -> Tensor:
        """Return (B, D) unit vectors of (B, 3, H, W) pictures in [0, 1]; the gradient flows to the pictures."""
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = nn.functional.interpolate(images, size, mode="bicubic", antialias=True)
        return _unit(self.model.get_image_features(pixel_values=(images - self.mean) / self.std))


def _unit(features: object) -> Tensor:
    """Normalise features; transformers 5 wraps them in an output object, 4 returned the tensor."""
    tensor = features if isinstance(features, Tensor) else features.pooler_output  # type: ignore[attr-defined]
    return nn.functional.normalize(tensor, dim=-1)
