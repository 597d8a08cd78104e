"""Sphere tracing of the procedural scenes: images to train the embedded prior on.

White background, Lambert shading under two lights that are fixed in the world and symmetric in y, silhouettes
anti-aliased by how near a missing ray came to the surface in units of a pixel's footprint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras, cast_rays
from dist_vsd.normal_maps import color_normals
from dist_vsd.priors.embedded.scenes import SCENE_RADIUS, albedo, signed_distance

NUM_MARCH_STEPS = 48
# Distances of ellipsoids and cones are not exact: a full step could pass through a thin part.
STEP_FRACTION = 0.9
HIT_DISTANCE = 2e-3
AMBIENT, KEY_STRENGTH, FILL_STRENGTH = 0.50, 0.42, 0.16
KEY_LIGHT = (0.55, 0.0, 0.835)
FILL_LIGHT = (-0.9, 0.0, 0.436)


def _sphere_interval(origins: Tensor, directions: Tensor, radius: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return entry and exit distances, (N,), of rays through a centred sphere, and (N,) whether they meet it."""
    b = (origins * directions).sum(-1)
    discriminant = b.square() - origins.square().sum(-1) + radius**2
    root = discriminant.clamp_min(0.0).sqrt()
    return (-b - root).clamp_min(0.0), -b + root, discriminant > 0


def _normals(name: str, points: Tensor, proportions: Tensor, step: float = 2e-3) -> Tensor:
    """Estimate (N, 3) unit normals from four signed distances at the corners of a tetrahedron."""
    corners = points.new_tensor([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]])
    distances = signed_distance(name, points[None] + step * corners[:, None], proportions[None])
    return torch.nn.functional.normalize((corners[:, None] * distances[..., None]).sum(0), dim=-1)


def render_object(name: str, colors: list[str], proportions: Tensor, cameras: Cameras, size: int) -> Tensor:
    """Return the first of render_channels(): B images alone."""
    return render_channels(name, colors, proportions, cameras, size)[0]


@torch.no_grad()
def render_channels(name: str, colors: list[str], proportions: Tensor, cameras: Cameras, size: int) -> tuple[Tensor, Tensor]:
    """Render B variants of one object, one camera each, shaded and as normal maps.

    Args:
        name: one of scenes.OBJECTS.
        colors: B colour words.
        proportions: (B, NUM_PROPORTIONS) in [-1, 1].
        cameras: B cameras outside the sphere of SCENE_RADIUS.
        size: height and width in pixels.

    Returns:
        (B, 3, size, size) images in [0, 1] on white, and as many normal maps on white, coloured by color_normals.
    """
    count = len(cameras)
    origins, directions = (r.reshape(-1, 3) for r in cast_rays(cameras, size, size))
    owner = torch.arange(count).repeat_interleave(size * size)
    footprint = (2 * torch.tan(cameras.fov / 2) / size)[owner]
    near, far, meets = _sphere_interval(origins, directions, SCENE_RADIUS)

    # Marching keeps only the rays that neither hit nor left; `closest` remembers each ray's smallest distance in pixels.
    closest = torch.full_like(near, float("inf"))
    closest_depth = near.clone()
    ray = meets.nonzero().squeeze(-1)
    depth = near[ray]
    for _ in range(NUM_MARCH_STEPS):
        distance = signed_distance(name, origins[ray] + depth[:, None] * directions[ray], proportions[owner[ray]])
        pixels = torch.where(distance > HIT_DISTANCE, distance / (depth * footprint[ray]), 0.0)
        nearer = pixels < closest[ray]
        closest[ray] = torch.where(nearer, pixels, closest[ray])
        closest_depth[ray] = torch.where(nearer, depth, closest_depth[ray])
        depth = depth + STEP_FRACTION * distance
        marching = (distance > HIT_DISTANCE) & (depth < far[ray])
        ray, depth = ray[marching], depth[marching]
        if ray.numel() == 0:
            break

    coverage = (1.0 - closest).clamp(0.0, 1.0)
    visible = (coverage > 0).nonzero().squeeze(-1)
    points = origins[visible] + closest_depth[visible, None] * directions[visible]
    normal = _normals(name, points, proportions[owner[visible]])
    light = AMBIENT + KEY_STRENGTH * (normal @ normal.new_tensor(KEY_LIGHT)).clamp_min(0.0)
    light = light + FILL_STRENGTH * (normal @ normal.new_tensor(FILL_LIGHT)).clamp_min(0.0)
    base = torch.empty(visible.numel(), 3)
    color_of_ray = owner[visible]
    for color in set(colors):
        chosen = torch.tensor([c == color for c in colors])[color_of_ray]
        base[chosen] = albedo(name, color, points[chosen], proportions[color_of_ray[chosen]])
    shaded = (base * light[:, None]).clamp(0.0, 1.0)
    seen = color_normals(normal, cameras.c2w[owner[visible]])

    def on_white(values: Tensor) -> Tensor:
        image = torch.ones(count * size * size, 3)
        image[visible] = coverage[visible, None] * values + (1 - coverage[visible, None])
        return image.reshape(count, size, size, 3).permute(0, 3, 1, 2).contiguous()

    return on_white(shaded), on_white(seen)
