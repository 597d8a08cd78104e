"""Triangles on a grid of pixels: which pixel centres each covers; of them textures are baked and meshes are pictured."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from dist_vsd.cameras import Cameras

CHUNK_PIXELS = 1 << 20
NEAREST = 1e-3  # of what is seen to the camera, scene units
EDGE = 1e-9  # by which a centre on the edge of two triangles belongs to both rather than to none, of a triangle's height
# Of (N,) indices of faces and (N, 3) weights of their corners, the (N, 3) colours there.
Colors = Callable[[np.ndarray, np.ndarray], np.ndarray]


def fragments(corners: np.ndarray, height: int, width: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Find the pixels whose centres lie in triangles, some triangles at a time.

    Args:
        corners: (F, 3, 2) columns and rows of their corners, in pixels: (0, 0) is the upper left corner of the first pixel.
        height, width: of the grid.

    Yields:
        (N,) indices of triangles; (N,) of pixels, row by row; (N, 3) weights of the corners, which sum to 1.
    """
    corners = corners.astype(np.float64)
    first, last = _span(corners[..., 1], height)
    faces, rows = _repeat(first, last)
    for begin in range(0, len(faces), CHUNK_PIXELS // 8):
        part = slice(begin, begin + CHUNK_PIXELS // 8)
        lines = _columns(corners, faces[part], rows[part], width)
        counts = np.cumsum(np.maximum(lines[1] - lines[0], 0))
        cuts = np.searchsorted(counts, np.arange(CHUNK_PIXELS, counts[-1] + CHUNK_PIXELS, CHUNK_PIXELS)) if len(counts) else []
        for few in np.split(np.arange(len(counts)), [cut for cut in cuts if 0 < cut < len(counts)]):
            line, columns = _repeat(lines[0][few], lines[1][few])
            face, row = faces[part][few][line], rows[part][few][line]
            if len(face):
                yield face, row * width + columns, _weights(corners[face], columns + 0.5, row + 0.5)


def _span(places: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first pixel, and the one after the last, whose centre lies between the least and the greatest of (F, 3) places."""
    return np.clip(np.ceil(places.min(1) - 0.5), 0, size).astype(int), np.clip(np.floor(places.max(1) - 0.5) + 1, 0, size).astype(int)


def _repeat(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for all numbers of all ranges [first, last), the index of the range and the number."""
    counts = np.maximum(last - first, 0)
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts) + first[index]


def _columns(corners: np.ndarray, faces: np.ndarray, rows: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for each face and row the first column whose centre is inside, and the one after the last."""
    low, high = np.full(len(faces), -np.inf), np.full(len(faces), np.inf)
    a, b, c = (corners[:, i] for i in range(3))
    area = ((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0])[faces]
    for i in range(3):
        start, end = corners[faces, i], corners[faces, (i + 1) % 3]
        # Inside is where slope * x + level >= 0, for the edge seen with the triangle on its left.
        side = np.sign(area)
        slope = -(end - start)[:, 1] * side
        level = side * ((end - start)[:, 0] * (rows + 0.5 - start[:, 1]) + (end - start)[:, 1] * start[:, 0]) + EDGE * np.abs(area)
        with np.errstate(divide="ignore", invalid="ignore"):
            bound = -level / slope
        low = np.where(slope > 0, np.maximum(low, bound), low)
        high = np.where(slope < 0, np.minimum(high, bound), high)
        high = np.where((slope == 0) & (level < 0), -np.inf, high)
    high = np.where(area == 0, -np.inf, high)
    return np.clip(np.ceil(low - 0.5), 0, width).astype(int), np.clip(np.floor(high - 0.5) + 1, 0, width).astype(int)


def _weights(corners: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the (N, 3) weights of the corners of N triangles at N points in them."""
    a, b, c = (corners[:, i] for i in range(3))
    area = (b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]
    of_b = ((x - a[:, 0]) * (c - a)[:, 1] - (y - a[:, 1]) * (c - a)[:, 0]) / area
    of_c = ((b - a)[:, 0] * (y - a[:, 1]) - (b - a)[:, 1] * (x - a[:, 0])) / area
    weights = np.clip(np.stack([1 - of_b - of_c, of_b, of_c], 1), 0, 1)
    return weights / weights.sum(1, keepdims=True)


def render_mesh(vertices: np.ndarray, faces: np.ndarray, color: Colors, cameras: Cameras, size: int) -> tuple[Tensor, Tensor]:
    """Picture a mesh as a viewer does that adds no light: the nearest face of each pixel's centre, on white.

    Args:
        vertices: (V, 3) scene units.
        faces: (F, 3), seen from both sides; those that reach behind the camera are left out.
        color: of points on faces.
        cameras: B of them.
        size: height and width, pixels.

    Returns:
        (B, 3, size, size) pictures in [0, 1], and (B, 1, size, size) of ones where there is a face.
    """
    pictures, covered = np.ones((len(cameras), size * size, 3), np.float32), np.zeros((len(cameras), size * size, 1), np.float32)
    for view in range(len(cameras)):
        face, weights = _nearest_faces(vertices, faces, cameras[view : view + 1], size)
        seen = np.flatnonzero(face >= 0)
        pictures[view, seen] = color(face[seen], weights[seen])
        covered[view, seen] = 1.0
    return tuple(torch.from_numpy(rows).reshape(len(cameras), size, size, -1).permute(0, 3, 1, 2) for rows in (pictures, covered))


def _nearest_faces(vertices: np.ndarray, faces: np.ndarray, camera: Cameras, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for each of size^2 pixels the nearest face, or -1, and the (size^2, 3) weights of its corners there."""
    c2w = camera.c2w[0].double().cpu().numpy()
    places = (vertices - c2w[:3, 3]) @ c2w[:3, :3]
    depth = np.maximum(-places[:, 2], NEAREST)
    focal = size / 2 / np.tan(float(camera.fov[0]) / 2)
    pixels = np.stack([size / 2 + focal * places[:, 0] / depth, size / 2 - focal * places[:, 1] / depth], 1)
    (in_front,) = (depth[faces] > NEAREST).all(1).nonzero()
    nearness = np.zeros(size * size)
    nearest, corner_weights = np.full(size * size, -1), np.zeros((size * size, 3))
    for index, pixel, weights in fragments(pixels[faces[in_front]], size, size):
        index = in_front[index]
        inverse = weights / depth[faces[index]]  # linear on the picture, as depth is not
        near = inverse.sum(1)
        order = near.argsort(kind="stable")
        order = order[near[order] > nearness[pixel[order]]]  # of several assignments to a pixel the last, the nearest, stays
        nearness[pixel[order]], nearest[pixel[order]] = near[order], index[order]
        corner_weights[pixel[order]] = inverse[order] / near[order, None]
    return nearest, corner_weights
