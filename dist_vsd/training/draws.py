"""The random draws of an update: cameras, timesteps and noise, each keyed by what it is for, never by the rank that draws it.

All are drawn on the host, before the update's first render, and travel to the device in one copy.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras, look_at_origin
from dist_vsd.config import RunConfig
from dist_vsd.diffusion.process import Process
from dist_vsd.diffusion.timesteps import max_fraction_at
from dist_vsd.distributed.random import Purpose, keyed_generator


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The particles that take part in one update, the same on all ranks.

    Attributes:
        theta: ids of those that take a step.
        phi: ids of those whose renders phi learns from.
    """

    theta: frozenset[int]
    phi: frozenset[int]


def choose_particles(config: RunConfig, num_particles: int, index: int) -> Chosen:
    """Draw which particles take part in an update; the smaller of the two sets is part of the larger, so that renders serve both."""
    sizes = [size or num_particles for size in (config.particles.theta_batch, config.particles.phi_batch)]
    if min(sizes) == num_particles:
        everyone = frozenset(range(num_particles))
        return Chosen(everyone, everyone)
    order = torch.randperm(num_particles, generator=keyed_generator(config.seed, "chosen_particles", update=index)).tolist()
    return Chosen(*(frozenset(order[:size]) for size in sizes))


@dataclasses.dataclass(frozen=True)
class Shot:
    """What a prior scores together, before it is rendered: the views of one particle that share t and pass through it as one sample.

    Every draw is keyed by the shot, so the ranks divide shots among themselves, never the views of one.

    Attributes:
        particle: its id.
        number: among the shots of the particle in an update.
        num_views: V, the prior's views_per_shot.
    """

    particle: int
    number: int
    num_views: int = 1


def key(config: RunConfig, purpose: Purpose, shot: Shot, index: int, step: int = 0) -> torch.Generator:
    """Return the generator of one draw of a shot."""
    return keyed_generator(config.seed, purpose, particle=shot.particle, shot=shot.number, update=index, step=step)


def draw_cameras(config: RunConfig, shot: Shot, index: int) -> Cameras:
    """Draw the cameras of a shot (ProlificDreamer, appendix: uniform in azimuth, elevation, distance and fov).

    Its V cameras have one elevation, distance and field of view, and stand 360 / V degrees apart, as MVDream's do.
    """
    camera, generator, count = config.camera, key(config, "camera", shot, index), shot.num_views
    azimuth = draw_from((-180.0, 180.0), generator) + torch.arange(count).double() * (360.0 / count)
    high = bool(torch.rand(1, generator=generator) < camera.high_elevation_share)
    elevation = draw_from(camera.high_elevation_deg if high else camera.elevation_deg, generator)
    distance, fov = draw_from(camera.distance, generator), draw_from(camera.fov_deg, generator)
    return look_at_origin(azimuth, elevation.expand(count), distance.expand(count), fov.expand(count))


def draw_from(interval: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Draw (1,) from an interval, uniformly; fp64, so that poses are exact before they are rounded to theta's precision."""
    low, high = interval
    return low + (high - low) * torch.rand(1, generator=generator).double()


def draw_t(config: RunConfig, shot: Shot, index: int, progress: float, process: Process) -> Tensor:
    """Draw a shot's t from the range at a progress in [0, 1); (V,) times of the process, the same for all its views."""
    u = torch.rand(1, generator=key(config, "timestep", shot, index))
    high = max_fraction_at(config.timesteps, progress)
    return process.draw_t(u, config.timesteps.min_fraction, high).expand(shot.num_views)


def draw_phi_t(config: RunConfig, shot: Shot, index: int, step: int, process: Process) -> Tensor:
    """Draw t' for phi's step, always from the whole range; (V,) times of the process."""
    u = torch.rand(1, generator=key(config, "phi_timestep", shot, index, step))
    return process.draw_t(u, 0.0, 1.0).expand(shot.num_views)


def draw_kept_pose(config: RunConfig, shot: Shot, index: int, step: int) -> Tensor:
    """Draw whether phi sees the poses of a shot in this step; (V,) bool."""
    u = torch.rand(1, generator=key(config, "pose_dropout", shot, index, step))
    return (u >= config.score.pose_dropout).expand(shot.num_views)


def draw_noise(config: RunConfig, purpose: Purpose, shot: Shot, index: int, shape: tuple[int, ...], step: int = 0) -> Tensor:
    """Draw standard normal noise for each view of a shot, (V, *shape)."""
    return torch.randn(shot.num_views, *shape, generator=key(config, purpose, shot, index, step))
