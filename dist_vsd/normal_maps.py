"""How surface normals are coloured: the one convention of whatever shows or learns from normal maps, meshes and fields and priors alike."""

from __future__ import annotations

from torch import Tensor


def color_normals(normal: Tensor, c2w: Tensor, opacity: Tensor | float = 1.0) -> Tensor:
    """Return (n + 1) / 2 on white, n being the normal along the camera's axes: right, up, towards the camera.

    What faces the camera is (0.5, 0.5, 1), as the embedded multi-view prior's normal maps have it (priors/embedded/render.py).
    The gradient flows to normal and opacity.

    Args:
        normal: (..., 3) along the axes of the world; of unit length, or premultiplied by opacity.
        c2w: (..., 4, 4) camera-to-world matrices, or their (..., 3, 3) rotations.
        opacity: (..., 1) in [0, 1] by which ``normal`` was multiplied.

    Returns:
        (..., 3) in [0, 1].
    """
    seen = (normal[..., None, :] @ c2w[..., :3, :3]).squeeze(-2) / 2 + 0.5
    return seen + (1 - opacity) / 2  # opacity (n + 1) / 2 + (1 - opacity), where opacity n is given
