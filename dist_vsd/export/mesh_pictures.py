"""Pictures of meshes whose points have looked-up colours, as a viewer shows them that adds no light."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.rasterization.antialias import antialias
from dist_vsd.rasterization.fragments import pixels, spread
from dist_vsd.rasterization.rasterize import rasterize

# Of (N,) indices of faces and (N, 3) weights of their corners, the (N, 3) colours there.
Colors = Callable[[np.ndarray, np.ndarray], np.ndarray]


@torch.no_grad()
def render_mesh(vertices: np.ndarray, faces: np.ndarray, color: Colors, cameras: Cameras, size: int) -> tuple[Tensor, Tensor]:
    """Picture a mesh on white, its silhouettes antialiased, one view at a time to bound memory.

    Args:
        vertices: (V, 3) scene units.
        faces: (F, 3), seen from both sides.
        color: of points on faces.
        cameras: B of them.
        size: height and width, pixels.

    Returns:
        (B, 3, size, size) pictures in [0, 1], and (B, 1, size, size) how much of each pixel is covered, on the CPU.
    """
    places, corners = torch.from_numpy(vertices), torch.from_numpy(faces).long()
    views = [_view(places, corners, color, cameras[view : view + 1].to("cpu"), size) for view in range(len(cameras))]
    layers = torch.cat(views).movedim(-1, 1).float()
    return layers[:, :3] + 1 - layers[:, 3:], layers[:, 3:]


def _view(vertices: Tensor, faces: Tensor, color: Colors, camera: Cameras, size: int) -> Tensor:
    """Return (1, H, W, 4) of a view, antialiased: colours, and how much is covered; zeros where there is no face."""
    seen = rasterize(vertices, faces, camera, size)
    pixel = pixels(seen.face)
    face, weights = seen.face.flatten()[pixel], seen.barycentric.flatten(0, 2)[pixel]
    found = torch.from_numpy(color(face.numpy(), weights.numpy())).to(weights)
    return antialias(spread(torch.cat([found, torch.ones_like(found[:, :1])], 1), pixel, seen.face), seen)
