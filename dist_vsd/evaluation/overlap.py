"""How much of the known scene's volume a field fills: intersection over union at the best turn, scale and threshold."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from scipy.ndimage import binary_fill_holes
from torch import Tensor

from dist_vsd.particles.iso_level import density_volume
from dist_vsd.particles.radiance_field import RadianceField
from dist_vsd.priors.embedded.scenes import NUM_PROPORTIONS, signed_distance

RESOLUTION, BLOCK = 48, 4  # points along an edge
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


class Lattice:
    """The RESOLUTION^3 points of a cube, by blocks: a block that is farther from a scene than its corners are from its centre is outside.

    That is exact, and spares most points the evaluation: a signed distance is never above the true one.

    Args:
        bound: half the edge of the cube.
    """

    def __init__(self, bound: float) -> None:
        axis = (torch.arange(RESOLUTION) + 0.5) / RESOLUTION * 2 * bound - bound
        points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
        per_edge, rows = RESOLUTION // BLOCK, torch.arange(RESOLUTION**3)
        by_block = rows.view(per_edge, BLOCK, per_edge, BLOCK, per_edge, BLOCK).permute(0, 2, 4, 1, 3, 5)
        self.points, self._blocks = points, by_block.reshape(per_edge**3, BLOCK**3)
        self._centers = points[self._blocks].mean(1)
        self._radius = 1.001 * float((points[self._blocks[0]] - self._centers[0]).norm(dim=-1).max())  # and rounding

    def inside(self, name: str, turn_deg: float, scale: float) -> Tensor:
        """Return which of the (RESOLUTION^3,) points lie inside a canonical scene, turned about z and scaled."""
        near = scene_distance(name, turn_deg, scale, self._centers) <= self._radius / scale
        rows = self._blocks[near].reshape(-1)
        found = torch.zeros(len(self.points), dtype=torch.bool)
        found[rows] = scene_distance(name, turn_deg, scale, self.points[rows]) < 0
        return found


def scene_distance(name: str, turn_deg: float, scale: float, points: Tensor) -> Tensor:
    """Return the signed distances, in scene units, of (N, 3) points to the canonical scene, turned about z and scaled."""
    angle = math.radians(turn_deg)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y, z = (points / scale).unbind(-1)
    turned = torch.stack([cos * x + sin * y, cos * y - sin * x, z], -1)
    return signed_distance(name, turned, torch.zeros(1, NUM_PROPORTIONS))


@functools.lru_cache(maxsize=2)
def _posed_scenes(name: str, bound: float) -> tuple[list[tuple[int, float]], Tensor]:
    """Return the poses of the search and (num_poses, RESOLUTION^3) volumes; kept, since a prompt's particles are all compared with them."""
    lattice = Lattice(bound)
    poses = [(turn, scale) for turn in TURNS_DEG for scale in SCALES]
    return poses, torch.stack([lattice.inside(name, *pose) for pose in poses])


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

