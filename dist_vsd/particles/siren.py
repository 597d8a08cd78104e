"""A picture as a coordinate network with sine activations (SIREN; Sitzmann et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_vsd.cameras import Cameras
from dist_vsd.particles.particle import Particle, Render
from dist_vsd.particles.particle_configs import SirenConfig


class SirenParticle(Particle):
    """A map from (x, y) in [-1, 1]^2 to RGB.

    The weights start as in the paper's section 3.2: the first layer's from U(-1/n, 1/n), the others' from
    U(-sqrt(6/n)/omega_0, sqrt(6/n)/omega_0), so that activations keep their distribution through the layers.

    Args:
        config: sizes, frequencies and learning rate.
        generator: draws the start, on the CPU.
    """

    def __init__(self, config: SirenConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        widths = [2, *[config.hidden_width] * config.num_hidden, 3]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        for index, layer in enumerate(self.layers):
            num_inputs = layer.in_features
            limit = 1 / num_inputs if index == 0 else (6 / num_inputs) ** 0.5 / config.hidden_omega
            for parameter in (layer.weight, layer.bias):
                parameter.data.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * limit)

    def forward(self, points: Tensor) -> Tensor:
        """Return (N, 3) colours in (0, 1) at (N, 2) points."""
        hidden = points
        for index, layer in enumerate(self.layers[:-1]):
            omega = self.config.first_omega if index == 0 else self.config.hidden_omega
            hidden = torch.sin(omega * layer(hidden))
        return self.layers[-1](hidden).sigmoid()

    def picture(self, size: int) -> Tensor:
        """Return (1, 3, size, size); the gradient flows to theta."""
        weight = self.layers[0].weight
        axis = (torch.arange(size, device=weight.device, dtype=weight.dtype) + 0.5) / size * 2 - 1
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        return self(torch.stack([x, y], -1).reshape(-1, 2)).T.reshape(1, 3, size, size)

    def render(self, cameras: Cameras, size: int, drawn: Mapping[str, Tensor] | None = None) -> Render:
        """Return the picture at ``size`` pixels, once for each camera."""
        image = self.picture(size).expand(len(cameras), -1, -1, -1)
        return Render(image, torch.ones_like(image[:, :1]), image, {})

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the one group, the network."""
        return [{"name": "network", "params": list(self.layers.parameters()), "lr": self.config.lr}]
