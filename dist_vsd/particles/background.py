"""What lies behind a render while it is optimised."""

from __future__ import annotations

import dataclasses

import torch

from dist_vsd.particles.particle import Render


def over_random_background(render: Render, share: float, generator: torch.Generator) -> Render:
    """Composite a render over one random colour instead of its own background, with a probability; foreground and opacity stay.

    An object that is opaque where it should be looks the same before every colour, and a background can't play its part. Both public
    implementations of ProlificDreamer do so in half of an object's updates (thu-ml's from the 2,000th on, threestudio's from the
    first, as here; threestudio's scenes do not). The background that is replaced gets no gradient from this render.

    Args:
        render: of B cameras.
        share: the probability, in [0, 1].
        generator: on the CPU; the same draws give the same background.
    """
    is_replaced = bool(torch.rand((), generator=generator) < share)
    if not is_replaced:
        return render
    color = torch.rand(3, generator=generator).to(render.foreground).view(1, 3, 1, 1)
    return dataclasses.replace(render, image=render.foreground + (1 - render.opacity) * color)
