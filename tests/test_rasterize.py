"""Triangles on pixels, against the definition pixel by pixel; pictures of meshes against closed forms."""

import math

import numpy as np
import pytest
import trimesh

from dist_vsd.cameras import turntable
from dist_vsd.export import rasterize
from dist_vsd.export.rasterize import fragments, render_mesh

HEIGHT, WIDTH = 30, 40


def collected(corners):
    """Return all faces, pixels and weights at once."""
    return [np.concatenate(column) for column in zip(*fragments(corners, HEIGHT, WIDTH), strict=True)]


def expected_pixels(triangle):
    """Return the pixels whose centres lie in a triangle, by the signs of three cross products."""
    x, y = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    signs = []
    for i in range(3):
        a, b = triangle[i], triangle[(i + 1) % 3]
        signs.append((b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0]))
    inside = np.all(np.array(signs) > 0, 0) | np.all(np.array(signs) < 0, 0)
    return np.flatnonzero(inside)


def test_a_triangle_covers_the_pixels_whose_centres_it_holds_in_whatever_order_its_corners_come():
    corners = np.random.default_rng(0).uniform(-10, 50, (200, 3, 2))
    faces, pixels, _ = collected(corners)
    for index, triangle in enumerate(corners):
        assert np.array_equal(np.sort(pixels[faces == index]), expected_pixels(triangle)), index


def test_weights_give_the_pixels_centre_back():
    corners = np.random.default_rng(1).uniform(-10, 50, (50, 3, 2))
    faces, pixels, weights = collected(corners)
    centres = np.stack([pixels % WIDTH + 0.5, pixels // WIDTH + 0.5], 1)
    assert np.abs((corners[faces] * weights[..., None]).sum(1) - centres).max() < 1e-6
    assert weights.min() >= 0


def test_two_triangles_of_a_square_leave_no_pixel_out():
    square = np.array([[0.5, 0.5], [20.5, 0.5], [20.5, 20.5], [0.5, 20.5]])  # edges and the diagonal through centres
    _, pixels, _ = collected(square[[[0, 1, 2], [0, 2, 3]]])
    assert len(np.unique(pixels)) == 21 * 21


def test_nothing_depends_on_how_many_pixels_are_made_at_once(monkeypatch):
    corners = np.random.default_rng(2).uniform(0, 40, (80, 3, 2))
    whole = collected(corners)
    monkeypatch.setattr(rasterize, "CHUNK_PIXELS", 64)
    parts = collected(corners)
    orders = [np.lexsort((pixels, faces)) for faces, pixels, _ in (whole, parts)]
    assert all(np.array_equal(a[orders[0]], b[orders[1]]) for a, b in zip(whole, parts, strict=True))


def test_triangles_without_an_area_or_beyond_the_grid_cover_nothing():
    flat, away = [[1, 1], [9, 9], [5, 5]], [[100, 100], [120, 100], [100, 120]]
    assert list(fragments(np.array([flat, away], float), HEIGHT, WIDTH)) == []


@pytest.mark.parametrize("is_far_first", [True, False])
def test_a_picture_of_a_ball_is_a_disc_and_the_nearer_of_two_is_seen(is_far_first):
    far, near = trimesh.creation.icosphere(4, 0.5), trimesh.creation.icosphere(4, 0.2)
    near.apply_translation([1.0, 0.0, 0.0])
    both = trimesh.util.concatenate([far, near] if is_far_first else [near, far])
    num_far = len(far.faces)
    is_near = (np.arange(len(both.faces)) >= num_far) == is_far_first  # both balls have as many faces
    size, camera = 100, turntable(1, 0.0, 3.0, 40.0)
    colors = np.array([[1.0, 0, 0], [0, 0, 1.0]])
    picture, covered = render_mesh(both.vertices, both.faces, lambda face, _: colors[is_near[face].astype(int)], camera, size)
    focal = size / 2 / math.tan(math.radians(20))
    # A ball of radius r at distance d is seen under the angle asin(r / d).
    areas = [math.pi * (focal * math.tan(math.asin(r / d))) ** 2 for r, d in ((0.5, 3.0), (0.2, 2.0))]
    assert abs(float(covered.sum()) - areas[0]) < 0.02 * areas[0]
    assert abs(float((picture[0, 2] - picture[0, 0] > 0.5).sum()) - areas[1]) < 0.04 * areas[1]
    assert picture[0, :, 0, 0].tolist() == [1, 1, 1]


def test_what_lies_on_a_face_is_looked_up_in_perspective():
    # A floor from near to far: half way down the picture's floor is not half way along it.
    floor = np.array([[1.5, -1, -0.3], [1.5, 1, -0.3], [-9.0, 1, -0.3], [-9.0, -1, -0.3]])
    faces, camera, size = np.array([[0, 1, 2], [0, 2, 3]]), turntable(1, 0.0, 3.0, 40.0), 64
    picture, covered = render_mesh(floor, faces, lambda face, w: ((floor[faces[face]] * w[..., None]).sum(1) + 10) / 20, camera, size)
    rows, columns = np.nonzero(covered[0, 0].numpy())
    # The ray through a row falls by its slope: the floor is met where it has fallen by 0.3.
    slope = ((rows + 0.5) / size * 2 - 1) * math.tan(math.radians(20))
    assert np.abs(picture[0, 0].numpy()[rows, columns] * 20 - 10 - (3.0 - 0.3 / slope)).max() < 1e-4
