"""Random numbers keyed by what they are for, never by the rank that draws them.

Any layout of particles over ranks, and any resumed run, therefore draws the same numbers. Generators live on the CPU;
what they draw is moved to the device afterwards, so that a GPU sees the same numbers as well.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch

# One name for each draw of the project: a camera of a particle, its t and eps, phi's own t' and eps', and so on.
Purpose = Literal[
    "initialize_theta",
    "initialize_phi",
    "camera",
    "ray_jitter",
    "background",
    "occupancy",
    "timestep",
    "noise",
    "phi_timestep",
    "phi_noise",
    "pose_dropout",
    "chosen_particles",
    "augmentation",
    "ancestral",
]


def keyed_generator(
    seed: int, purpose: Purpose, *, particle: int = 0, view: int = 0, update: int = 0, step: int = 0
) -> torch.Generator:
    """Return a CPU generator for one purpose of one view of one particle at one update.

    Args:
        seed: of the run.
        purpose: what the numbers are for.
        particle: id of the particle, counted over the whole run.
        view: index of the particle's view within the update.
        update: index of the update, from 0.
        step: index of phi's step within the update.

    Returns:
        A generator whose stream is independent of those with any other key.
    """
    key = f"{seed}/{purpose}/{particle}/{view}/{update}/{step}".encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
