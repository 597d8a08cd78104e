"""How much of the known scene's volume a field fills: intersection over union at the best turn, scale and threshold."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from scipy.ndimage import binary_fill_holes
from torch import Tensor

from dist_vsd.export.surface import density_volume
from dist_vsd.particles.radiance_field import RadianceField
from dist_vsd.priors.embedded.scenes import NUM_PROPORTIONS, signed_distance

RESOLUTION = 48
TURNS_DEG = tuple(range(0, 360, 10))
SCALES = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2)
THRESHOLDS = (2.0, 5.0, 10.0, 20.0)


@dataclasses.dataclass(frozen=True)
class Overlap:
    """The best overlap of a field with a scene.

    Attributes:
        iou: intersection over union, in [0, 1].
        turn_deg: of the scene about z, degrees.
        scale: of the scene.
        threshold: density above which the field counts as occupied.
    """

    iou: float
    turn_deg: float
    scale: float
    threshold: float


def occupied_volume(density: Tensor, threshold: float) -> Tensor:
    """Return where a (R, R, R) density is above a threshold or enclosed by such cells.

    A field is free to be hollow inside an opaque skin, where no camera looks; such holes count as filled.
    """
    solid = (density > threshold).cpu().numpy()
    return torch.from_numpy(binary_fill_holes(solid))


def scene_volume(name: str, turn_deg: float, scale: float, points: Tensor) -> Tensor:
    """Return which of (N, 3) points lie inside the canonical scene, turned about z and scaled."""
    angle = math.radians(turn_deg)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y, z = (points / scale).unbind(-1)
    turned = torch.stack([cos * x + sin * y, cos * y - sin * x, z], -1)
    return signed_distance(name, turned, torch.zeros(1, NUM_PROPORTIONS)) < 0


@functools.lru_cache(maxsize=2)
def _posed_scenes(name: str, bound: float) -> tuple[list[tuple[int, float]], Tensor]:
    """Return the poses of the search and (num_poses, RESOLUTION^3) volumes; kept, since a prompt's particles are all compared with them."""
    axis = (torch.arange(RESOLUTION) + 0.5) / RESOLUTION * 2 * bound - bound
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    poses = [(turn, scale) for turn in TURNS_DEG for scale in SCALES]
    return poses, torch.stack([scene_volume(name, *pose, points) for pose in poses])


@torch.no_grad()
def best_overlap(field: RadianceField, name: str) -> Overlap:
    """Find the best intersection over union of a field with a canonical scene.

    The search runs over TURNS_DEG about z, SCALES and THRESHOLDS of the density.

    Args:
        field: the particle.
        name: an object of the embedded prior's scenes.
    """
    poses, volumes = _posed_scenes(name, field.config.bound)
    scenes = volumes.float()
    density = density_volume(field, RESOLUTION)
    best = Overlap(0.0, 0.0, 1.0, THRESHOLDS[0])
    for threshold in THRESHOLDS:
        solid = occupied_volume(density, threshold).reshape(-1).float()
        intersection = scenes @ solid
        iou = intersection / (scenes.sum(1) + solid.sum() - intersection).clamp_min(1.0)
        index = int(iou.argmax())
        if float(iou[index]) > best.iou:
            best = Overlap(float(iou[index]), *map(float, poses[index]), threshold)
    return best

