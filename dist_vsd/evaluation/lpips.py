"""LPIPS: how different pictures look, by AlexNet's features (Zhang et al. 2018, arXiv 1801.03924), version 0.1 of its weights.

The libraries that offer it (lpips, torchmetrics) need torchvision for AlexNet and download or unpickle its weights; five convolutions
are all that it takes. The weights come as one safetensors file, which `lpips` writes where it is installed:

    python -c "import lpips, safetensors.torch as s; s.save_model(lpips.LPIPS(net='alex'), 'lpips_alex.safetensors')"
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from dist_vsd.serialization import read_tensors

# Inputs are scaled from [-1, 1] to the moments of ImageNet.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Names of AlexNet's convolutions in lpips' state dict, with (inputs, outputs, kernel, stride, padding); a pool follows the first two.
CONVOLUTIONS = {
    "net.slice1.0": (3, 64, 11, 4, 2),
    "net.slice2.3": (64, 192, 5, 1, 2),
    "net.slice3.6": (192, 384, 3, 1, 1),
    "net.slice4.8": (384, 256, 3, 1, 1),
    "net.slice5.10": (256, 256, 3, 1, 1),
}
NUM_POOLED = 2
SMALLEST_SIZE = 35  # below it nothing is left for the second pool
PICTURES_AT_ONCE = 64


class Lpips:
    """AlexNet with the weights of its channels.

    Args:
        tensors: by the names of lpips' own state dict.

    Raises:
        ValueError: one is missing or has another shape.
    """

    def __init__(self, tensors: dict[str, Tensor], device: torch.device | str = "cpu") -> None:
        self.device = device
        self._convolutions, self._weights = [], []
        for layer, (name, (inputs, outputs, kernel, stride, padding)) in enumerate(CONVOLUTIONS.items()):
            weight = _take(tensors, [f"{name}.weight"], (outputs, inputs, kernel, kernel)).to(device)
            bias = _take(tensors, [f"{name}.bias"], (outputs,)).to(device)
            self._convolutions.append((weight, bias, stride, padding))
            names = [f"lin{layer}.model.1.weight", f"lins.{layer}.model.1.weight"]
            self._weights.append(_take(tensors, names, (1, outputs, 1, 1)).to(device))

    @staticmethod
    def load(file: Path, device: torch.device | str = "cpu") -> Lpips:
        """Load a safetensors file; see the module.

        Raises:
            ValueError: it is missing, damaged, or of another network.
        """
        try:
            return Lpips(read_tensors(file), device)
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"LPIPS weights {file} can't be used ({error}): save lpips.LPIPS(net='alex') as safetensors") from error

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Return the (B, C, h, w) features of each layer, of unit length along C, of (B, 3, H, W) pictures in [0, 1]."""
        shift, scale = (torch.tensor(moments, device=pictures.device)[:, None, None] for moments in (SHIFT, SCALE))
        x, layers = (2 * pictures - 1 - shift) / scale, []
        for layer, (weight, bias, stride, padding) in enumerate(self._convolutions):
            if 0 < layer <= NUM_POOLED:
                x = max_pool2d(x, 3, 2)
            x = nn.functional.conv2d(x, weight, bias, stride, padding).relu()
            layers.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return layers

    @torch.no_grad()
    def mean_distance(self, pictures: Tensor) -> float:
        """Return the mean LPIPS between two particles from the same camera.

        LPIPS is a sum of squares of differences, so over all pairs it follows from the sums of features and of their squares:
        sum_{i<j} |f_i - f_j|^2 = n sum_i |f_i|^2 - |sum_i f_i|^2.

        Args:
            pictures: (n, V, 3, H, W) in [0, 1], n at least 2.

        Raises:
            ValueError: they are too small for AlexNet.
        """
        n, num_views = pictures.shape[:2]
        if min(pictures.shape[-2:]) < SMALLEST_SIZE:
            raise ValueError(f"LPIPS needs pictures of at least {SMALLEST_SIZE} pixels, got {min(pictures.shape[-2:])}: leave lpips out")
        total = 0.0
        for view in range(num_views):
            sums = [torch.zeros((), device=self.device, dtype=torch.float64) for _ in self._weights]
            squares = [torch.zeros((), device=self.device, dtype=torch.float64) for _ in self._weights]
            for chunk in pictures[:, view].split(PICTURES_AT_ONCE):
                for layer, features in enumerate(self.features(chunk.to(self.device))):
                    sums[layer] = sums[layer] + features.double().sum(0)
                    squares[layer] = squares[layer] + features.double().square().sum(0)
            for weight, first, second in zip(self._weights, sums, squares, strict=True):
                total += float((weight[0] * (n * second - first.square())).sum(0).mean())
        return total / (num_views * n * (n - 1) / 2)


def _take(tensors: dict[str, Tensor], names: list[str], shape: tuple[int, ...]) -> Tensor:
    """Return the first of some tensors that is there, if it has the shape."""
    found = next((tensors[name] for name in names if name in tensors), None)
    if found is None:
        raise ValueError(f"{names[0]} is missing")
    if found.shape != shape:
        raise ValueError(f"{names[0]} has shape {tuple(found.shape)}, not {shape}")
    return found.float()
