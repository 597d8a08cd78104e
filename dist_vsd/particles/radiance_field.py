"""A radiance field: an encoding, a small MLP, a background, and an occupancy grid that tells where it is empty."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dist_vsd.cameras import Cameras, cast_rays
from dist_vsd.normal_maps import color_normals
from dist_vsd.particles.colored_particle import ColoredParticle, as_images
from dist_vsd.particles.occupancy import make_grid, refresh
from dist_vsd.particles.particle import Render
from dist_vsd.particles.particle_configs import RadianceFieldConfig
from dist_vsd.particles.volume_rendering import Rays, Sampling, cells_of, render_rays


class RadianceField(ColoredParticle):
    """A particle in 3D: density and colour from an encoding and an MLP, without view dependence.

    Args:
        config: sizes and learning rates.
        generator: draws the start, on the CPU.
    """

    def __init__(self, config: RadianceFieldConfig, generator: torch.Generator) -> None:
        super().__init__(config, generator)
        names = ("num_samples", "samples_per_ray", "visible_per_ray", "hidden_below", "tile_points")
        self.sampling = Sampling(config.bound, **{name: getattr(config, name) for name in names})
        self.occupancy = make_grid(config.bound, config.occupancy_resolution)
        if config.track_origin:
            self.register_buffer("origin", torch.zeros(3))

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N,) densities, in 1 / scene units, and (N, 3) colours in [0, 1] padded by COLOR_PADDING, at (N, 3) points."""
        config = self.config
        raw, color = self.raw_and_color(points)
        start = config.density_strength * (1 - points.norm(dim=-1) / config.density_radius)
        return nn.functional.softplus(raw + start), color

    def density(self, points: Tensor) -> Tensor:
        """Return (N,) densities at (N, 3) points."""
        return self(points)[0]

    def seen_density(self, points: Tensor) -> Tensor:
        """Return (N,) densities at (N, 3) points, as a render sees them: 0 where the occupancy grid is empty."""
        full = cells_of(points, self.occupancy.binaries[0], self.config.bound).nonzero().squeeze(-1)
        return points.new_zeros(len(points)).index_put((full,), self.density(points[full]))

    @property
    def center(self) -> Tensor:
        """(3,) where in the field the cameras' origin lies: what is at this point is rendered at the origin."""
        return self.origin if self.config.track_origin else next(self.parameters()).new_zeros(3)

    def draw(self, num_views: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """See Particle: where on its ray's intervals each ray is sampled and, if it is random, the background of each view."""
        offset = torch.rand(num_views * size * size, generator=generator)
        return {"offset": offset} | super().draw(num_views, size, generator)

    def render(self, cameras: Cameras, size: int, drawn: Mapping[str, Tensor] | None = None) -> Render:
        """Render B images by volume rendering; see Particle.render.

        Regularizers: ``opacity``, the mean opacity of the pixels (sparsity); ``entropy``, of the pixels' opacity;
        ``weight_entropy``, of the samples' weights; ``depth_variance``; see Rays. Normals are those of -grad density, computed when asked.
        """
        batch = len(cameras)
        origins, directions = self._rays(cameras, size)
        num_rays = origins.shape[0]
        offset = origins.new_full((num_rays,), 0.5) if drawn is None else drawn["offset"].to(origins)
        rays = render_rays(
            self, self.density, self.occupancy.binaries[0], origins, directions, offset, num_rays // batch, self.sampling
        )
        background = self.background_behind(directions, batch, drawn)
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
            normal=lambda: self._normals(cameras, size, rays),
            depth=as_images(rays.distance[:, None], batch, size),
        )

    def _rays(self, cameras: Cameras, size: int) -> tuple[Tensor, Tensor]:
        """Return origins and directions of the rays of all pixels, (B * size * size, 3) each."""
        origins, directions = (r.reshape(-1, 3) for r in cast_rays(cameras, size, size))
        return origins + self.origin if self.config.track_origin else origins, directions

    def _normals(self, cameras: Cameras, size: int, rays: Rays) -> Tensor:
        """Return the normal maps of a render; rays are cast again, so that a render of which nobody asks this holds nothing for it."""
        half_interval = self.config.bound / self.config.num_samples  # what is finer than an interval the samples do not see
        normals = rays.normals(self.density, *self._rays(cameras, size), half_interval, self.sampling)
        c2w = cameras.c2w.repeat_interleave(size * size, 0)
        return as_images(color_normals(normals, c2w, rays.opacity[:, None]), len(cameras), size)

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
