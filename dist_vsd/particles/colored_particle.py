"""What fields and meshes share: an encoding and a small MLP that give every point a colour, and what lies behind the object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_vsd.kernels.two_layers import two_layers
from dist_vsd.particles.dense_grid import DenseGrid
from dist_vsd.particles.hash_grid import HashGrid
from dist_vsd.particles.particle import Particle
from dist_vsd.particles.particle_configs import RadianceFieldConfig

# Colours reach a little beyond [0, 1] (as in mip-NeRF). With a plain sigmoid the early pull towards a pure colour drives the
# raw values so far out that a part of another colour, a green duck's orange beak, never comes back.
COLOR_PADDING = 0.05


class ColoredParticle(Particle):
    """A particle in 3D whose points have a colour, without view dependence, and before which lies a background.

    Args:
        config: sizes and learning rates.
        generator: draws the start, on the CPU.
    """

    def __init__(self, config: RadianceFieldConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        if config.encoding == "dense":
            self.encoding: nn.Module = DenseGrid(config.dense_grid, generator)
        else:
            self.encoding = HashGrid(config.hash_grid, generator)
        self.hidden = _linear(self.encoding.num_outputs, config.hidden_width, generator)
        self.output = _linear(config.hidden_width, 4, generator)
        if config.background == "learned":
            self.background_hidden = _linear(3, 16, generator)
            self.background_output = _linear(16, 3, generator)

    def raw_and_color(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N,) raw values of the network, and (N, 3) colours in [0, 1] padded by COLOR_PADDING, at (N, 3) points."""
        raw = two_layers(self.encoding(points / self.config.bound), self.hidden, self.output)
        return raw[:, 0], (1 + 2 * COLOR_PADDING) * raw[:, 1:].sigmoid() - COLOR_PADDING

    def color_at(self, points: Tensor) -> Tensor:
        """Return (N, 3) colours in [0, 1], padded by COLOR_PADDING, at (N, 3) points."""
        return self.raw_and_color(points)[1]

    def background_behind(self, directions: Tensor, batch: int, drawn: Mapping[str, Tensor] | None) -> Tensor:
        """Return the (N, 3) colours behind N rays of ``batch`` views."""
        if self.config.background == "learned":
            return self.background_output(torch.relu(self.background_hidden(directions))).sigmoid()
        if self.config.background == "random" and drawn is not None:
            return drawn["background"].to(directions).repeat_interleave(directions.shape[0] // batch, 0)
        return torch.ones_like(directions)

    def draw(self, num_views: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """See Particle: if it is random, the background of each view."""
        return {"background": torch.rand(num_views, 3, generator=generator)} if self.config.background == "random" else {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return Adam's groups: the encoding, the MLP and, if it is learned, the background."""
        config = self.config
        groups = [
            {"name": "encoding", "params": list(self.encoding.parameters()), "lr": config.encoding_lr},
            {"name": "mlp", "params": [*self.hidden.parameters(), *self.output.parameters()], "lr": config.mlp_lr},
        ]
        if config.background == "learned":
            background = [*self.background_hidden.parameters(), *self.background_output.parameters()]
            groups.append({"name": "background", "params": background, "lr": config.background_lr})
        return groups


def as_images(rays: Tensor, batch: int, size: int) -> Tensor:
    """Lay (B * size * size, C) values of rays out as (B, C, size, size) pictures."""
    return rays.reshape(batch, size, size, -1).permute(0, 3, 1, 2).contiguous()


def _linear(num_inputs: int, num_outputs: int, generator: torch.Generator) -> nn.Linear:
    """Make a linear layer with He's uniform start drawn from ``generator`` and no bias to begin with."""
    layer = nn.Linear(num_inputs, num_outputs)
    limit = (6.0 / num_inputs) ** 0.5
    with torch.no_grad():
        layer.weight.copy_((torch.rand(num_outputs, num_inputs, generator=generator) * 2 - 1) * limit)
        layer.bias.zero_()
    return layer
