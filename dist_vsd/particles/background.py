"""What lies behind a render while it is optimised."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dist_vsd.particles.particle import Render


def draw_background(share: float, generator: torch.Generator) -> Tensor:
    """Draw whether a background is replaced, with a probability of ``share``, and by which colour.

    Returns:
        (4,): 1 or 0, and a colour in [0, 1).
    """
    is_replaced = torch.rand(1, generator=generator) < share
    return torch.cat([is_replaced.float(), torch.rand(3, generator=generator)])


def over_random_background(render: Render, drawn: Tensor) -> Render:
    """Composite a render over one random colour instead of its own background, where that was drawn; foreground and opacity stay.

    An object that is opaque where it should be looks the same before every colour, and a background can't play its part. Both public
    implementations of ProlificDreamer do so in half of an object's updates (thu-ml's from the 2,000th on, threestudio's from the
    first, as here; threestudio's scenes do not). The background that is replaced gets no gradient from this render.

    Args:
        render: of B cameras.
        drawn: (4,) of draw_background.
    """
    image = render.foreground + (1 - render.opacity) * drawn[1:].view(1, 3, 1, 1)
    return dataclasses.replace(render, image=torch.where(drawn[0] > 0, image, render.image))
