"""A radiance field: an encoding, a small MLP, a background, and an occupancy grid that tells where it is empty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_vsd.cameras import Cameras, cast_rays
from dist_vsd.kernels.two_layers import two_layers
from dist_vsd.particles.dense_grid import DenseGrid
from dist_vsd.particles.hash_grid import HashGrid
from dist_vsd.particles.occupancy import make_grid, refresh
from dist_vsd.particles.particle import Particle, Render
from dist_vsd.particles.particle_configs import RadianceFieldConfig
from dist_vsd.particles.volume_rendering import Sampling, render_rays

# Colours reach a little beyond [0, 1] (as in mip-NeRF). With a plain sigmoid the early pull towards a pure colour drives the
# raw values so far out that a part of another colour, a green duck's orange beak, never comes back.
COLOR_PADDING = 0.05


class RadianceField(Particle):
    """A particle in 3D: density and colour from an encoding and an MLP, without view dependence.

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
        names = ("num_samples", "samples_per_ray", "visible_per_ray", "hidden_below", "tile_points")
        self.sampling = Sampling(config.bound, **{name: getattr(config, name) for name in names})
        self.occupancy = make_grid(config.bound, config.occupancy_resolution)
        if config.track_origin:
            self.register_buffer("origin", torch.zeros(3))

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N,) densities, in 1 / scene units, and (N, 3) colours in [0, 1] padded by COLOR_PADDING, at (N, 3) points."""
        config = self.config
        raw = two_layers(self.encoding(points / config.bound), self.hidden, self.output)
        start = config.density_strength * (1 - points.norm(dim=-1) / config.density_radius)
        color = (1 + 2 * COLOR_PADDING) * raw[:, 1:].sigmoid() - COLOR_PADDING
        return nn.functional.softplus(raw[:, 0] + start), color

    def density(self, points: Tensor) -> Tensor:
        """Return (N,) densities at (N, 3) points."""
        return self(points)[0]

    @property
    def center(self) -> Tensor:
        """(3,) where in the field the cameras' origin lies: what is at this point is rendered at the origin."""
        return self.origin if self.config.track_origin else next(self.parameters()).new_zeros(3)

    def draw(self, num_views: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """See Particle: where on its ray's intervals each ray is sampled and, if it is random, the background of each view."""
        drawn = {"offset": torch.rand(num_views * size * size, generator=generator)}
        if self.config.background == "random":
            drawn["background"] = torch.rand(num_views, 3, generator=generator)
        return drawn

    def render(self, cameras: Cameras, size: int, drawn: Mapping[str, Tensor] | None = None) -> Render:
        """Render B images by volume rendering; see Particle.render.

        Regularizers: ``opacity``, the mean opacity of the pixels (sparsity); ``entropy``, of the pixels' opacity;
        ``weight_entropy``, of the samples' weights; ``depth_variance``; see Rays.
        """
        config = self.config
        batch = len(cameras)
        origins, directions = (r.reshape(-1, 3) for r in cast_rays(cameras, size, size))
        if config.track_origin:
            origins = origins + self.origin
        num_rays = origins.shape[0]
        offset = origins.new_full((num_rays,), 0.5) if drawn is None else drawn["offset"].to(origins)
        rays = render_rays(
            self, self.density, self.occupancy.binaries[0], origins, directions, offset, num_rays // batch, self.sampling
        )
        background = self._background(directions, batch, drawn)
        color = rays.color + (1 - rays.opacity[:, None]) * background

        return Render(
            as_images(color, batch, size),
            as_images(rays.opacity[:, None], batch, size),
            as_images(rays.color, batch, size),
            {
                "opacity": rays.opacity.mean,
                "entropy": rays.opacity_entropy,
                "weight_entropy": rays.weight_entropy,
                "depth_variance": rays.depth_variance,
            },
        )

    def _background(self, directions: Tensor, batch: int, drawn: Mapping[str, Tensor] | None) -> Tensor:
        """Return the (N, 3) colours behind N rays."""
        if self.config.background == "learned":
            return self.background_output(torch.relu(self.background_hidden(directions))).sigmoid()
        if self.config.background == "random" and drawn is not None:
            return drawn["background"].to(directions).repeat_interleave(directions.shape[0] // batch, 0)
        return torch.ones_like(directions)

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

    def changes_at(self, update: int) -> bool:
        """See Particle: every ``occupancy_every`` updates."""
        return update % self.config.occupancy_every == 0

    @torch.no_grad()
    def after_update(self, update: int, generator: torch.Generator, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Refresh the occupancy grid."""
        config = self.config
        step, number = 2 * config.bound / config.num_samples, update // config.occupancy_every
        refresh(self.occupancy, self.density, config.bound, step, number, config.occupancy_threshold)
        if config.track_origin:
            self._follow_center_of_mass()

    def _follow_center_of_mass(self) -> None:
        """Move the origin towards the centre of mass of the density that the occupancy grid has seen."""
        resolution, bound = self.config.occupancy_resolution, self.config.bound
        axis = ((torch.arange(resolution, device=self.origin.device) + 0.5) / resolution * 2 - 1) * bound
        cells = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
        mass = self.occupancy.occs.reshape(-1, 1).clamp_min(0)
        center = (mass * cells).sum(0) / mass.sum().clamp_min(1e-8)
        self.origin.lerp_(center, 1 - self.config.origin_decay**self.config.occupancy_every)


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
