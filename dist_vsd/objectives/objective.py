"""What every objective is to an update: from a micro-batch of renders to the gradients that backward() starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.particles.particle import Render
from dist_vsd.priors.prior import Text, TextEmbeddings

if TYPE_CHECKING:
    from dist_vsd.config import RunConfig
    from dist_vsd.priors.prior import Prior
    from dist_vsd.score.score import Score


@dataclasses.dataclass(frozen=True)
class Noised:
    """Encoded renders at a noise level, x_t = alpha_t x_0 + sigma_t eps, and what they are of.

    Rows are views, the V of a shot next to each other; they share t.

    Attributes:
        x_0: (B, ...) encoded renders, with theta's graph.
        x_t: (B, ...) noised, detached.
        t: (B,) timesteps.
        eps: (B, ...) the noise.
        alpha_t, sigma_t, w_t: (B, 1, ...) of the noise level, and its weight w(t).
        y_c: B texts with view words, of which eps_pretrain is asked.
        y: B texts without, of which eps_phi is asked.
        pose: (B, P), as phi is told it.
        cameras: B, from which the renders are seen, for a prior that knows cameras; else None.
        eps_phi: (B, ...) where phi's training pass at this very x_t has given it already; else None, and who needs it asks phi.
    """

    x_0: Tensor
    x_t: Tensor
    t: Tensor
    eps: Tensor
    alpha_t: Tensor
    sigma_t: Tensor
    w_t: Tensor
    y_c: TextEmbeddings
    y: Text
    pose: Tensor
    cameras: Cameras | None
    eps_phi: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
    """A micro-batch of shots, of B views in all, as an objective is given it.

    Attributes:
        renders: one a shot, of its V views, with theta's graph.
        cameras: B, from which they are seen.
        progress: of the run, in [0, 1).
        drawn: one a shot, what the objective's ``draw`` gave for it, on the device.
        noised: for an objective that asks a diffusion model; else None.
    """

    renders: list[Render]
    cameras: Cameras
    progress: float
    drawn: list[Mapping[str, Tensor]]
    noised: Noised | None = None


@dataclasses.dataclass(frozen=True)
class Cotangents:
    """Where backward() starts.

    Attributes:
        roots: tensors with theta's graph, each with the gradient of the objective with respect to it; None: it is a scalar loss.
        figures: to report, by name.
        score_gap: (B,) ||eps_pretrain - eps_phi|| of each render, where there are both; else None.
    """

    roots: list[tuple[Tensor, Tensor | None]]
    figures: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    score_gap: Tensor | None = None


class Objective(Protocol):
    """What pulls on the particles. It is made of (config, prior, eps_phi or None); objectives/table.py lists all.

    Attributes:
        asks_prior: whether it asks the diffusion model, so that renders are encoded and noised for it.
        draws_particles: whether it sets particles to samples instead of moving them (``sample``), in the first update.
    """

    asks_prior: bool = True
    draws_particles: bool = False

    def __init__(self, config: RunConfig, prior: Prior, score: Score | None) -> None: ...

    def draw(self, num_views: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw what the objective needs beside t and eps for a shot of some views; nothing by default.

        Args:
            num_views: of the shot.
            generator: on the CPU.

        Returns:
            Tensors on the CPU, by name: Batch.drawn has them on the device.
        """
        return {}

    def cotangents(self, batch: Batch) -> Cotangents:
        """Return the gradient of the objective, summed over a micro-batch; nothing is changed by it."""
        ...


def of_scores(noised: Noised, gradient: Tensor, has_phi: bool = False) -> Cotangents:
    """Return the cotangents of an objective whose gradient is with respect to x_0.

    Args:
        noised: what was asked about.
        gradient: (B, ...) like x_0.
        has_phi: whether the gradient is w(t) (eps_pretrain - eps_phi), whose norm without the weight is then told.
    """
    gap = (gradient / noised.w_t).flatten(1).norm(dim=1) if has_phi else None
    return Cotangents([(noised.x_0, gradient)], {"theta/score_gradient_norm": gradient.norm()}, gap)
