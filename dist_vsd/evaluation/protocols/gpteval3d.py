"""GPTEval3D (Wu et al. 2024, arXiv 2401.04092): what its gpt_eval_alpha.py reads, METHOD/PROMPT/SEED/rgb_0.png and normal_0.png to 119.

Read in its code (3DTopia/GPTEval3D at 2382bdd): the names of folders and files, and that views are numbered from 0 with nothing put before
the number (utils/t23d_tournament.py, get_image_for_promptid; its README has them from 001), PROMPT being the prompt's place in
prompts.json and SEED 0, the only one that it looks at. Four views of a judge's picture are 0, 30, 60 and 90, so they have to go around
evenly. Its README asks for 512 pixels and for the cameras of threestudio, whose code (threestudio-project/threestudio at 28d9d80,
data/uncond.py and the renderers) has 120 azimuths from 0 to 360 degrees, both included, an elevation of 15, and colours of the normals
along the axes of the world on black. How the normals of the other methods in its tournament were coloured it does not say (its issue 4
asks, unanswered).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras, look_at_origin
from dist_vsd.config import CameraConfig
from dist_vsd.evaluation.protocols.folders import Folder, write_pictures
from dist_vsd.evaluation.views import middle_of
from dist_vsd.particles.channels import picture_of
from dist_vsd.particles.particle import Particle

NUM_VIEWS, ELEVATION_DEG = 120, 15.0


def folder_name(method: str, prompt: int, seed: int) -> str:
    """Return the name of the folder of a particle; ``prompt`` is its place in prompts.json."""
    return f"{method}/{prompt}/{seed}"


def cameras_of(camera: CameraConfig) -> Cameras:
    """Return the 120 cameras: one turn, whose last looks from where the first does, as threestudio's.

    Distance and field of view are the middle of the run's own, as each method of the tournament has those that suit its objects
    (threestudio's configurations: 1.5 to 3 and 45 to 70 degrees).

    Args:
        camera: of the run.
    """
    azimuth = torch.linspace(0.0, 360.0, NUM_VIEWS)
    distance, fov_deg = middle_of(camera)
    ones = torch.ones_like(azimuth)
    return look_at_origin(azimuth, ELEVATION_DEG * ones, distance * ones, fov_deg * ones)


def color_normals_of_world(shown: Tensor, opacity: Tensor, c2w: Tensor) -> Tensor:
    """Turn a render's normals, coloured along the camera's axes on white, into threestudio's colours: along the world's, on black.

    color_normals (normal_maps.py) has m = o n / 2 + 1 - o / 2 of a unit normal n along the camera's axes and an opacity o; so
    o n = 2 m - 2 + o. In the world's axes, at unit length: o (n + 1) / 2.

    Args:
        shown: (B, 3, H, W), m.
        opacity: (B, 1, H, W) in [0, 1].
        c2w: (B, 4, 4) camera-to-world matrices.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    seen = 2 * shown - 2 + opacity
    normal = torch.nn.functional.normalize(torch.einsum("bij,bjhw->bihw", c2w[:, :3, :3], seen), dim=1)
    return opacity * (normal + 1) / 2


def write(folder: Folder, theta: Particle, camera: CameraConfig, size: int, tell: Callable[[], None]) -> None:
    """Write the views of a particle: its colours before its own background, and its normals.

    Args:
        folder: of ``folder_name``.
        theta: a particle that shows normals.
        camera: of its run.
        size: height and width, pixels.
        tell: called after each view.
    """
    cameras = cameras_of(camera).to(next(theta.parameters()).device)

    @torch.no_grad()
    def render(view: int) -> tuple[Tensor, Tensor]:
        one = cameras[view : view + 1]
        found = theta.render(one, size)
        return picture_of(found, "color", one), color_normals_of_world(found.channel("normal"), found.opacity, one.c2w)

    names = [(f"rgb_{view}.png", f"normal_{view}.png") for view in range(NUM_VIEWS)]
    write_pictures(folder, names, render, tell)
