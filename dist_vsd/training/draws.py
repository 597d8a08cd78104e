"""The random draws of an update: cameras, timesteps and noise, each keyed by what it is for, never by the rank that draws it.

All are drawn on the host, before the update's first render, and travel to the device in one copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras, look_at_origin
from dist_vsd.config import RunConfig
from dist_vsd.device import brought_together
from dist_vsd.diffusion.process import Process
from dist_vsd.diffusion.timesteps import range_at
from dist_vsd.distributed.layout import Shot
from dist_vsd.distributed.random import Purpose, keyed_generator
from dist_vsd.particles.background import draw_background
from dist_vsd.training.prompt import views_of
from dist_vsd.training.state import TrainingState
from dist_vsd.training.work import Work

CAMERA_FIELDS = tuple(field.name for field in dataclasses.fields(Cameras))
Key = tuple[str, Shot, int]  # what is drawn, for which shot, in which of phi's steps


class Draws:
    """What an update draws for the shots of this rank, and for the one that stands for a missing one (absent_shot).

    Args:
        state: of the run.
        work: of the update.
        index: of the update.
    """

    def __init__(self, state: TrainingState, work: Work, index: int) -> None:
        self._state, self._index, self._dtype = state, index, _dtype_of(state)
        self._host: dict[Key, Tensor] = {}
        self._names: dict[tuple[str, Shot], tuple[str, ...]] = {}
        absent = [absent_shot(state)] if state.phi is not None and state.layout.world_size > 1 else []
        self._draw_renders([*work.stepping, *work.others])
        self._draw_cameras([*work.stepping, *work.others, *absent])
        if state.objective.asks_prior:
            self._draw_noise([*work.stepping, *absent])
        for shot in work.stepping:
            views = state.objective.draw(shot.num_views, key(state.config, "augmentation", shot, index))
            self._put_named("objective", shot, views)
        if state.phi is not None and not state.config.score.reuse_pass:
            self._draw_phis([*(shot for shot in (*work.stepping, *work.others) if shot.particle in work.chosen.phi), *absent])
        self._here = brought_together(self._host, state.prior.device)

    def cameras(self, shots: Iterable[Shot]) -> Cameras:
        """Return the cameras of all views of some shots."""
        return Cameras(*(self._rows(name, shots) for name in CAMERA_FIELDS))

    def views(self, shots: Iterable[Shot]) -> Tensor:
        """Return from where each view looks, (B,) rows of VIEW_WORDS."""
        return self._rows("view", shots)

    def of_render(self, shot: Shot) -> Mapping[str, Tensor]:
        """Return what the shot's particle drew for its render (Particle.draw)."""
        return self._named("render", shot)

    def background(self, shot: Shot) -> Tensor:
        """Return whether a shot's background is replaced, and by which colour; see draw_background."""
        return self._rows("background", [shot])

    def of_objective(self, shot: Shot) -> Mapping[str, Tensor]:
        """Return what the objective drew for a shot (Objective.draw)."""
        return self._named("objective", shot)

    def t(self, shots: Iterable[Shot]) -> Tensor:
        """Return (B,) times of the process, the same for all views of a shot."""
        return self._rows("t", shots)

    def noise(self, shots: Iterable[Shot]) -> Tensor:
        """Return the noise of theta's step, (B, ...) like the prior's x_0."""
        return self._rows("noise", shots)

    def for_phi(self, shots: Iterable[Shot], step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return t' (B,), eps' (B, ...) and whether phi is told the pose (B,), of one of its steps."""
        shots = list(shots)
        return self._rows("phi_t", shots, step), self._rows("phi_noise", shots, step), self._rows("kept_pose", shots, step)

    def _rows(self, name: str, shots: Iterable[Shot], step: int = 0) -> Tensor:
        rows = [self._here[name, shot, step] for shot in shots]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _named(self, owner: str, shot: Shot) -> Mapping[str, Tensor]:
        return {name: self._here[f"{owner}/{name}", shot, 0] for name in self._names[owner, shot]}

    def _put_named(self, owner: str, shot: Shot, tensors: Mapping[str, Tensor]) -> None:
        """Keep what a particle or an objective drew, under names of its own."""
        self._names[owner, shot] = tuple(tensors)
        self._put(shot, {f"{owner}/{name}": tensor for name, tensor in tensors.items()})

    def _put(self, shot: Shot, tensors: Mapping[str, Tensor], step: int = 0) -> None:
        """Keep tensors; those of numbers in theta's precision."""
        for name, tensor in tensors.items():
            self._host[name, shot, step] = tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _draw_renders(self, shots: list[Shot]) -> None:
        config, particles = self._state.config, {particle.id: particle.theta for particle in self._state.particles}
        share = config.random_background_share
        for shot in shots:
            generator = key(config, "ray_jitter", shot, self._index)
            drawn = particles[shot.particle].draw(shot.num_views, config.render_size, generator)
            self._put_named("render", shot, drawn)
            if share > 0:
                self._put(shot, {"background": draw_background(share, key(config, "background", shot, self._index))})

    def _draw_cameras(self, shots: list[Shot]) -> None:
        config = self._state.config
        for shot in shots:
            cameras = draw_cameras(config, shot, self._index).to("cpu", self._dtype)
            self._put(shot, {name: getattr(cameras, name) for name in CAMERA_FIELDS} | {"view": views_of(cameras, config.camera)})

    def _draw_noise(self, shots: list[Shot]) -> None:
        config, prior, progress = self._state.config, self._state.prior, self._state.stage.progress(self._index)
        for shot in shots:
            self._host["t", shot, 0] = draw_t(config, shot, self._index, progress, prior.process)
            self._put(shot, {"noise": draw_noise(config, "noise", shot, self._index, prior.latent_shape)})

    def _draw_phis(self, shots: list[Shot]) -> None:
        config, prior, index = self._state.config, self._state.prior, self._index
        for shot in shots:
            for step in range(config.score.steps_per_update):
                self._host["phi_t", shot, step] = draw_phi_t(config, shot, index, step, prior.process)
                noise = draw_noise(config, "phi_noise", shot, index, prior.latent_shape, step)
                self._put(shot, {"phi_noise": noise, "kept_pose": draw_kept_pose(config, shot, index, step)}, step)


def absent_shot(state: TrainingState) -> Shot:
    """Return the shot that stands, with a weight of zero, for one that this rank lacks when it joins in the passes of others."""
    return Shot(state.particles[0].id, state.layout.shots[0], state.layout.views_per_shot)


def _dtype_of(state: TrainingState) -> torch.dtype:
    """Return the precision in which particles are rendered."""
    return next(state.particles[0].theta.parameters()).dtype


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
    return process.draw_t(u, *range_at(config.timesteps, progress)).expand(shot.num_views)


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
