"""The surface of a radiance field: its density sampled in a cube, the level at which a surface fits what is seen, and marching cubes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dist_vsd.cameras import Cameras, cast_rays, look_at_origin
from dist_vsd.particles.radiance_field import RadianceField

CHUNK_POINTS = 1 << 18
VOLUME_BYTES = 16  # of a cell of the sampled cube, at the most: its density, a copy, and marching cubes' own
# Views by which a level is judged: (elevation, azimuths) all around, from above too, with the whole cube in the picture.
TURNS_DEG, VIEW_PIXELS = ((15.0, 8), (60.0, 4)), 64
VIEW_DISTANCE = 4.0  # in halves of the cube's side
SOLID_OPACITY = 0.5


@torch.no_grad()
def density_volume(field: RadianceField, resolution: int) -> Tensor:
    """Evaluate the density at the centres of resolution^3 cells of the field's cube; (R, R, R), axes x, y, z.

    Where the occupancy grid is empty it is 0, as it is when the field is rendered.
    """
    bound, device = field.config.bound, next(field.parameters()).device
    axis = (torch.arange(resolution, device=device) + 0.5) / resolution * 2 * bound - bound
    volume = torch.zeros(resolution, resolution, resolution, device=device)
    num_planes = max(1, CHUNK_POINTS // resolution**2)
    for planes, density in zip(axis.split(num_planes), volume.split(num_planes), strict=True):
        points = torch.stack(torch.meshgrid(planes, axis, axis, indexing="ij"), -1).reshape(-1, 3)
        density.copy_(torch.cat([field.seen_density(chunk) for chunk in points.split(CHUNK_POINTS)]).view_as(density))
    return volume


@torch.no_grad()
def suitable_threshold(field: RadianceField, volume: Tensor, slack: float = 0.0) -> float:
    """Find the level whose surface has the silhouettes of the field's own renders.

    A ray meets the surface of level L if and only if the greatest density on it, M, is above L. So with M and the opacity of the rays of
    some views, the level at which the rays that meet the surface are best those that are more than half opaque (intersection over union)
    is found exactly, by sorting M: no surface is made for it. Where many levels do equally well, their middle is taken: of a field that
    jumps from nothing to its density, half of that, at which marching cubes puts the surface midway between two cells.

    Args:
        field: the particle.
        volume: its ``density_volume``, on its device.
        slack: share of the best that may be given up for a lower level, which leaves no dents where silhouettes don't tell.

    Returns:
        A density, 1 / scene units, that some of the volume is above.

    Raises:
        ValueError: no ray is more than half opaque where the volume has any density.
    """
    greatest, solid = [], []
    views = views_of_cube(field, TURNS_DEG)
    for view in range(len(views)):
        camera = views[view : view + 1]
        solid.append(field.render(camera, VIEW_PIXELS).opacity.flatten() > SOLID_OPACITY)
        greatest.append(_greatest_density(field, volume, camera))
    return _best_level(torch.cat(greatest).double().cpu(), torch.cat(solid).cpu(), slack)


def views_of_cube(field: RadianceField, turns_deg: Sequence[tuple[float, int]]) -> Cameras:
    """Return cameras that see the whole cube of a field: for each (elevation in degrees, number) so many, evenly around."""
    angles = torch.tensor([(azimuth * 360 / count, elevation) for elevation, count in turns_deg for azimuth in range(count)])
    ones = torch.ones(len(angles))
    fov_deg = 2 * math.degrees(math.asin(math.sqrt(3) / VIEW_DISTANCE))  # of the ball around the cube
    cameras = look_at_origin(angles[:, 0], angles[:, 1], VIEW_DISTANCE * field.config.bound * ones, fov_deg * ones)
    return cameras.to(next(field.parameters()).device)


def _greatest_density(field: RadianceField, volume: Tensor, camera: Cameras) -> Tensor:
    """Return for each ray of a camera the greatest density on it, interpolated between the cells' centres; (VIEW_PIXELS^2,)."""
    greatest = volume.new_zeros(VIEW_PIXELS**2)
    for rays, _, density in samples_along_rays(field, volume, camera, VIEW_PIXELS):
        greatest[rays] = density.amax(-1)
    return greatest


def samples_along_rays(field: RadianceField, volume: Tensor, camera: Cameras, pixels: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Sample a volume evenly along those of a camera's rays that cross the cube, some rays at a time.

    Args:
        field: whose cube it is.
        volume: its ``density_volume``, on its device.
        camera: one.
        pixels: along a side of its picture.

    Yields:
        (N,) numbers of rays, (N, S) distances from the camera and (N, S) densities there, interpolated between the cells' centres.
    """
    bound, resolution = field.config.bound, volume.shape[0]
    origins, directions = (rays[0] for rays in cast_rays(camera, pixels, pixels))
    origins = origins + field.center
    to_planes = torch.stack([(side * bound - origins) / directions for side in (-1.0, 1.0)])
    near, far = to_planes.amin(0).amax(-1), to_planes.amax(0).amin(-1)
    crosses = (near < far).nonzero().squeeze(-1)
    shares = (torch.arange(2 * resolution, device=volume.device) + 0.5) / (2 * resolution)  # a step is a cell's diagonal at the most
    for rays in crosses.split(max(1, CHUNK_POINTS // len(shares))):
        t = near[rays, None] + (far - near)[rays, None] * shares
        points = (origins[rays, None] + t[..., None] * directions[rays, None]) / bound
        sampled = torch.nn.functional.grid_sample(volume[None, None], points[None, None].flip(-1), align_corners=False)
        yield rays, t, sampled[0, 0, 0]


def _best_level(greatest: Tensor, solid: Tensor, slack: float = 0.0) -> float:
    """Return the level at which {greatest > level} has the most in common with ``solid``, or the lowest that is nearly as good.

    Args:
        greatest: (N,) greatest densities of rays.
        solid: (N,) booleans.
        slack: share of the best intersection over union that may be given up.
    """
    order = greatest.argsort(descending=True)
    values, right = greatest[order], solid[order].double().cumsum(0)
    counts = torch.arange(1, len(values) + 1, dtype=torch.float64)
    overlap = right / (counts + solid.sum() - right)  # if the first n rays meet the surface
    below = torch.cat([values[1:], values.new_zeros(1)])
    possible = values > below  # rays of equal density are met together or not at all
    if not possible.any() or overlap[possible].amax() == 0:
        raise ValueError("nothing is solid: no ray that meets density is more than half opaque; let it train longer, or give --threshold")
    good = (possible & (overlap >= (1 - slack) * overlap[possible].amax())).nonzero().squeeze(-1)
    chosen = good[-1] if slack else good[(values - below)[good].argmax()]
    return float((values[chosen] + below[chosen]) / 2)


def march(volume: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Find the surface of a level by marching cubes; a border of emptiness closes it where the object touches the cube.

    Args:
        volume: (R, R, R) densities, somewhere above the threshold.
        threshold: the level.

    Returns:
        (V, 3) vertices, in cells from the centre of the first, and (F, 3) faces that face outwards.
    """
    from skimage.measure import marching_cubes

    solid = volume > threshold
    low, high = [], []
    for axis in range(3):
        (filled,) = solid.any(tuple(other for other in range(3) if other != axis)).nonzero()
        low.append(max(0, filled[0] - 1))
        high.append(filled[-1] + 2)
    part = np.pad(volume[low[0] : high[0], low[1] : high[1], low[2] : high[2]], 1, constant_values=0.0)
    vertices, faces, _, _ = marching_cubes(part, threshold)
    return vertices - 1 + np.array(low), faces[:, ::-1]
