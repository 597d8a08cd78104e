"""Charts on a square: texels against the definition, square texels, and a user's own places that serve or don't."""

import numpy as np
import pytest
import trimesh

from dist_vsd.export import atlas as atlas_module
from dist_vsd.export.atlas import fault_of, texels, unwrap
from dist_vsd.export.surface import Atlas, Surface

SIZE = 40


def soup(num_faces, seed=0):
    """Triangles anywhere around the square, one beside the other as seen from each: their depths are equal."""
    uv = np.random.default_rng(seed).uniform(-0.25, 1.25, (3 * num_faces, 2)).astype(np.float32)
    return Atlas(np.arange(3 * num_faces), np.arange(3 * num_faces, dtype=np.int32).reshape(-1, 3), uv, num_faces)


def collected(atlas):
    return [np.concatenate(column) for column in zip(*texels(atlas, SIZE), strict=True)]


def expected_texels(triangle):
    """Return the texels whose centres lie in a triangle, by the signs of three cross products; u to the right, v downwards."""
    u, v = np.meshgrid((np.arange(SIZE) + 0.5) / SIZE, (np.arange(SIZE) + 0.5) / SIZE)
    signs = []
    for i in range(3):
        a, b = triangle[i], triangle[(i + 1) % 3]
        signs.append((b[0] - a[0]) * (v - a[1]) - (b[1] - a[1]) * (u - a[0]))
    return np.flatnonzero(np.all(np.array(signs) > 0, 0) | np.all(np.array(signs) < 0, 0))


def test_a_texel_belongs_to_the_first_triangle_that_holds_its_centre():
    atlas = soup(20)
    texel, face, _ = collected(atlas)
    owner = np.full(SIZE * SIZE, -1)
    for index in reversed(range(20)):
        owner[expected_texels(atlas.uv[atlas.faces[index]].astype(float))] = index
    assert np.array_equal(np.sort(texel), np.flatnonzero(owner >= 0))
    assert np.array_equal(owner[texel], face)


def test_weights_give_the_texels_centre_back():
    atlas = soup(20, seed=1)
    texel, face, weights = collected(atlas)
    centres = np.stack([texel % SIZE + 0.5, texel // SIZE + 0.5], 1) / SIZE
    assert np.abs((atlas.uv[atlas.faces[face]] * weights[..., None]).sum(1) - centres).max() < 1e-5
    assert weights.min() >= 0


def test_nothing_depends_on_how_many_texels_are_made_at_once(monkeypatch):
    whole = collected(soup(20))
    monkeypatch.setattr(atlas_module, "CHUNK_TEXELS", 64)
    for one, other in zip(whole, collected(soup(20)), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("sides", [(1, 1, 1), (3.0, 0.3, 0.2)], ids=["a cube", "a bar"])
def test_texels_are_square_however_long_the_rectangle_is_that_charts_fill(sides):
    pytest.importorskip("xatlas", reason="no wheel of xatlas for this Python")
    box = trimesh.creation.box(sides)
    atlas = unwrap(Surface(box.vertices.astype(np.float32), box.faces.astype(np.int32), lambda points: points))
    reach = atlas.uv.max(0)
    assert reach.min() < 0.8 < reach.max() <= 1.0  # the rectangle is not square, or nothing would be shown
    on_texture, on_box = (
        np.linalg.norm(places[faces] - places[np.roll(faces, 1, 1)], axis=2)
        for places, faces in ((atlas.uv, atlas.faces), (box.vertices, box.faces))
    )
    scale = on_texture / on_box
    assert scale.min() > 0.98 * scale.max()  # xatlas rounds charts to its grid


def sheet(uv, num_faces=2):
    """A square in the plane of x with its corners at places on a texture; as many faces of it as are wanted."""
    corners = np.array([[0, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1]], np.float32)
    faces = np.array([[0, 1, 2], [0, 2, 3]], np.int32)[:num_faces]
    return Surface(corners, faces, lambda points: points), Atlas(np.arange(4), faces, np.array(uv, np.float32), 1)


@pytest.mark.parametrize(
    ("uv", "fault"),
    [
        ([[0, 1], [1, 1], [1, 0], [0, 0]], ""),
        ([[0.1, 0.4], [0.3, 0.4], [0.3, 0.1], [0.1, 0.1]], ""),
        ([[0, 1], [1, 1], [1, 0], [1, 1]], "overlap in 99."),  # but for its edges
        ([[0, 1], [1, 1], [1, 0], [0.5, 0.55]], "overlap in"),
        ([[0, 1.5], [1, 1.5], [1, 0], [0, 0]], "reach from 0 to 1.5, beyond [0, 1]"),
        ([[-0.2, 1], [1, 1], [1, 0], [-0.2, 0]], "reach from -0.2 to 1, beyond [0, 1]"),
        ([[0.5, 0.5]] * 4, "leave 100% of the surface without room"),
        ([[0, 1], [1, 1], [1, 0], [1, 0]], "leave 50% of the surface without room"),
    ],
)
def test_places_that_can_not_hold_a_colour_for_each_point_are_told(uv, fault):
    found = fault_of(*sheet(uv))
    assert found.startswith(fault) if fault else found == ""


def test_neighbours_that_share_an_edge_through_texels_centres_do_not_overlap():
    # Of 1024 texels a side: the diagonal runs through 1024 centres, which belong to both triangles.
    assert fault_of(*sheet([[0, 0], [1, 0], [1, 1], [0, 1]])) == ""


def test_a_sound_layout_of_xatlas_is_found_sound():
    pytest.importorskip("xatlas", reason="no wheel of xatlas for this Python")
    ring = trimesh.creation.torus(0.5, 0.2, major_sections=32, minor_sections=16)
    surface = Surface(ring.vertices.astype(np.float32), ring.faces.astype(np.int32), lambda points: points)
    assert fault_of(surface, unwrap(surface)) == ""
