"""What every particle can do, whatever it is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_vsd.cameras import Cameras


@dataclasses.dataclass(frozen=True)
class Render:
    """What a particle shows to B cameras.

    Attributes:
        image: (B, 3, H, W) composited on the background; in [0, 1], or a few percent beyond where a field pads its colours. Of a
            latent particle: (B, C, h, w), x_0 itself.
        opacity: (B, 1, H, W) in [0, 1]; ones for a particle without depth.
        foreground: like image, premultiplied by opacity and without a background.
        regularizers: named scalars that may be weighed and added to the objective, differentiable in theta; computed when called.
        normal: (B, 3, H, W) surface normals of a particle that shows them, coloured and on white as color_normals has it (normal_maps.py);
            or a function that returns them, where they take work that only those who want to see them should pay; else None.
        depth: (B, 1, H, W) expected distance along the ray, from the camera to what it hits, scene units; 0 where it hits nothing. None
            for a particle without depth.
    """

    image: Tensor
    opacity: Tensor
    foreground: Tensor
    regularizers: dict[str, Callable[[], Tensor]]
    normal: Tensor | Callable[[], Tensor] | None = None
    depth: Tensor | None = None

    def channel(self, name: str) -> Tensor:
        """Return what an objective is to see, color or normal, as a picture; the gradient flows to theta either way."""
        if name == "color":
            return self.image
        assert self.normal is not None, "a representation that shows no normals"
        return self.normal() if callable(self.normal) else self.normal


class Particle(nn.Module):
    """theta^(i) with its differentiable image parameterisation g(theta, c).

    A particle is never wrapped in DistributedDataParallel: particles on different ranks are different objects.

    Attributes:
        is_latent: it renders x_0 itself, which the prior decodes for whoever wants to look.
        notes: lines to tell about how it began.
    """

    is_latent = False
    notes: tuple[str, ...] = ()

    def draw(self, num_views: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw what a render of some views takes, such as sample positions and a background; nothing by default.

        Args:
            num_views: of the render.
            size: height and width in pixels.
            generator: on the CPU.

        Returns:
            Tensors on the CPU, by name: ``render`` is given them on the particle's device.
        """
        return {}

    def render(self, cameras: Cameras, size: int, drawn: Mapping[str, Tensor] | None = None) -> Render:
        """Render g(theta, c); the gradient flows to theta.

        Args:
            cameras: B cameras on the particle's device.
            size: height and width in pixels.
            drawn: of ``draw``, on the particle's device; None renders without randomness.
        """
        raise TypeError(f"{type(self).__name__} does not render")

    @classmethod
    def from_particle(cls, config: Any, other: Particle, generator: torch.Generator) -> Particle:
        """Begin from a finished particle of another kind.

        Args:
            config: of this kind.
            other: to begin from.
            generator: of what the other one leaves open, on the CPU.

        Raises:
            ValueError: this kind can't begin from that one.
        """
        if type(other) is not cls:
            raise ValueError(f"{cls.__name__} can't begin from {type(other).__name__}: start from particles of the same representation")
        started = cls(config, generator)
        try:
            started.load_state_dict(other.state_dict())
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"the particles to start from have other sizes ({reason}): use the settings they were made with") from error
        return started

    def become(self, picture: Tensor) -> None:
        """Show a picture, or x_0 for a latent particle, as it is; what is sampled from the prior is put in by this.

        Args:
            picture: (C, H, W).
        """
        raise TypeError(f"{type(self).__name__} can't be set to a picture")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return Adam's parameter groups, each with its ``name``, by which a stage may train some alone, and its own ``lr``."""
        raise TypeError(f"{type(self).__name__} has no parameters")

    @property
    def statistics(self) -> list[Tensor]:
        """Buffers that a backward pass adds to, such as the gradients that tell where to grow.

        They are zero before the renders of an update and after its step; ``count`` is given their sums over all renders of the
        particle, on all ranks that share it.
        """
        return []

    def count(self, totals: list[Tensor]) -> None:
        """Take in the ``statistics`` of an update, summed over all renders: the same on every rank that shares the particle."""

    def forget(self) -> None:
        """Drop what was computed of parameters and grids and can be computed again: their tensors leave the device."""

    def changes_at(self, update: int) -> bool:
        """Say whether ``after_update`` has something to do after this update; the same on every rank that shares the particle."""
        return False

    def after_update(self, update: int, generator: torch.Generator, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Refresh what the particle keeps beside its parameters (an occupancy grid), or grow.

        Called after the Adam step of an update at which it ``changes_at``, on one of the ranks that share the particle alone: what it
        made of buffers and parameters is sent to the others.

        Args:
            update: index, from 0.
            generator: of its draws, on the CPU.
            optimizer: of the particle, which has to be told of parameters of another size (owned_particle.take_rows).
        """
