"""A surface made light, unwrapped and textured: a torus whose colours are known at each point."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import trimesh

from dist_vsd.config import CameraConfig
from dist_vsd.export.atlas import fault_of, require_xatlas, texels, unwrap
from dist_vsd.export.mesh import MeshOptions, make_mesh
from dist_vsd.export.mesh_files import write_obj
from dist_vsd.export.mesh_report import describe, psnr_db, what_was_lost
from dist_vsd.export.simplify import as_trimesh, drop_fragments, simplify
from dist_vsd.export.surface import Surface, find_surface
from dist_vsd.export.texture import bake
from tests.coloured_mesh import ColouredMesh, color_of, given

SIZE = 512
pytest.importorskip("xatlas", reason="no wheel of xatlas for this Python")


def surface_of(mesh):
    return Surface(mesh.vertices.astype(np.float32), mesh.faces.astype(np.int32), color_of)


@pytest.fixture(scope="module")
def torus():
    return surface_of(trimesh.creation.torus(0.5, 0.2, major_sections=80, minor_sections=40))


@pytest.fixture(scope="module")
def texture(torus):
    return bake(torus, unwrap(torus), SIZE)


def anywhere(torus, count=20_000):
    """Draw points on faces: indices, weights, places."""
    generator = np.random.default_rng(0)
    face, weights = generator.integers(0, len(torus.faces), count), generator.dirichlet([1, 1, 1], count)
    return face, weights, (torus.vertices[torus.faces[face]] * weights[..., None]).sum(1)


def test_charts_cover_no_texel_twice_and_keep_every_face(torus, texture):
    atlas = texture.atlas
    assert np.array_equal(atlas.vertex[atlas.faces], torus.faces)
    assert (atlas.uv.min() >= 0, atlas.uv.max() <= 1) == (True, True)
    assert fault_of(torus, atlas) == ""
    assert len(np.unique(np.concatenate([face for _, face, _ in texels(atlas, SIZE)]))) > 0.95 * len(torus.faces)


def test_every_point_of_the_surface_finds_its_colour_in_the_texture(torus, texture):
    face, weights, points = anywhere(torus)
    errors = np.abs(texture.colors()(face, weights) - color_of(torch.from_numpy(points)).numpy())
    # A byte's rounding, and at a chart's edge half a texel of 1 / 130 units at a slope of 1.2.
    assert errors.max() < 1 / 255 + 1.2 * 2 / texture.texels_per_unit
    assert errors.mean() < 1 / 255


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_texture_at_a_half_to_an_eighth_of_its_size_shows_no_seams(torus, texture, level):
    side = SIZE >> level
    smaller = texture.picture.reshape(side, 1 << level, side, 1 << level, 3).mean((1, 3))
    face, weights, points = anywhere(torus)
    found = dataclasses.replace(texture, picture=smaller.astype(np.uint8)).colors()(face, weights)
    errors = np.abs(found - color_of(torch.from_numpy(points)).numpy())
    texel = (1 << level) / texture.texels_per_unit
    # Of the nearest texels, all lie within two of the point, but for what the chart beside has brought beyond the padding.
    assert np.quantile(errors, 0.99) < 1.5 / 255 + 1.2 * 2 * texel


def test_texel_density_and_coverage_are_those_of_the_areas(torus, texture):
    corners = texture.atlas.uv[texture.atlas.faces].astype(float)
    edges = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    flat = np.abs(edges[0][:, 0] * edges[1][:, 1] - edges[0][:, 1] * edges[1][:, 0]).sum() / 2
    area = as_trimesh(torus).area
    assert texture.coverage == pytest.approx(flat, rel=0.01)
    assert texture.texels_per_unit == pytest.approx(SIZE * math.sqrt(flat / area), rel=0.01)


def test_fewer_faces_leave_a_torus_watertight_and_near_its_volume():
    torus = surface_of(trimesh.creation.torus(0.5, 0.2, major_sections=160, minor_sections=80))
    fewer = simplify(torus, 3000)
    assert len(torus.faces) == 25600
    assert len(fewer.faces) <= 3000
    assert as_trimesh(fewer).is_watertight
    assert as_trimesh(fewer).volume == pytest.approx(2 * math.pi**2 * 0.5 * 0.2**2, rel=0.02)
    assert simplify(torus, 30000) is torus


def test_fragments_and_the_walls_of_hollows_are_left_out_and_counted():
    body, crumb, hollow = trimesh.creation.icosphere(3, 0.5), trimesh.creation.icosphere(1, 0.02), trimesh.creation.icosphere(3, 0.4)
    part = trimesh.creation.icosphere(3, 0.2)
    crumb.apply_translation([0.9, 0, 0])
    part.apply_translation([0, 0.9, 0])
    hollow.invert()
    surface = surface_of(trimesh.util.concatenate([hollow, crumb, body, part]))
    rest, dropped = drop_fragments(surface)
    assert dropped == 2
    assert len(rest.faces) == len(body.faces) + len(part.faces)
    assert as_trimesh(rest).volume == pytest.approx(body.volume + part.volume, rel=1e-5)
    kept = make_mesh(surface, MeshOptions(texture_size=0, keep_fragments=True))
    assert (kept.num_fragments, len(kept.faces)) == (0, len(surface.faces))


def test_the_walls_of_what_is_open_are_kept():
    cup, other = trimesh.creation.icosphere(3, 0.5), trimesh.creation.icosphere(3, 0.4)
    cup.update_faces(cup.triangles_center[:, 2] < 0.2)
    other.invert()
    surface = surface_of(trimesh.util.concatenate([cup, other]))
    assert drop_fragments(surface)[1] == 0


def test_a_limit_of_faces_holds_with_a_texture_by_itself_and_without_one_only_if_it_is_given():
    assert MeshOptions().most_faces == 50_000
    assert MeshOptions(texture_size=0).most_faces == 0
    assert MeshOptions(texture_size=0, max_faces=7).most_faces == 7


def test_an_obj_without_a_texture_has_its_colours_at_the_vertices(torus, tmp_path):
    mesh = make_mesh(torus, MeshOptions(texture_size=0))
    assert write_obj(mesh, tmp_path / "torus.obj") == [tmp_path / "torus.obj"]
    read = trimesh.load(tmp_path / "torus.obj", process=False)
    assert np.allclose(np.asarray(read.visual.vertex_colors)[:, :3] / 255, mesh.vertex_colors, atol=0.003)


@pytest.mark.parametrize("texture_size", [0, 512])
def test_a_particle_that_is_a_surface_is_exported_as_it_is_and_little_is_lost(texture_size):
    theta = ColouredMesh()
    mesh = make_mesh(find_surface(theta, 0), MeshOptions(texture_size=texture_size))
    report = describe(mesh)
    assert (report["num_faces"], report["is_watertight"], report["num_fragments_dropped"]) == (len(theta.surface()[1]), True, 0)
    assert np.allclose(report["bounds"], [[-0.5] * 3, [0.5] * 3], atol=1e-3)
    lost = what_was_lost(mesh, theta, CameraConfig(), 64, None, "a ball")
    assert lost["psnr_db"] > 45
    assert lost["silhouette_iou"] == 1.0
    assert "clip_mesh" not in lost


def test_a_wrong_colour_and_a_wrong_shape_are_lost_more():
    theta, distance = ColouredMesh(), sum(CameraConfig().distance) / 2
    surface = find_surface(theta, 0)
    right, grey, larger = (
        what_was_lost(make_mesh(each, MeshOptions(texture_size=0)), theta, CameraConfig(), 64, None, "")
        for each in (
            surface,
            dataclasses.replace(surface, color=lambda points: 0 * points + 0.5),
            dataclasses.replace(surface, vertices=surface.vertices * np.float32(1.2)),
        )
    )
    assert right["psnr_db"] > grey["psnr_db"] + 10
    assert grey["silhouette_iou"] == right["silhouette_iou"]
    areas = [math.tan(math.asin(r / distance)) ** 2 for r in (0.5, 0.6)]  # of the discs as which balls are seen
    assert larger["silhouette_iou"] == pytest.approx(areas[0] / areas[1], abs=0.02)
    assert psnr_db(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.1)) == pytest.approx(20.0, abs=1e-4)


@pytest.fixture(scope="module")
def box():
    """A user's box whose six sides lie on a texture, two by three, each with a border, and its 24 vertices, four for each side."""
    mesh = trimesh.creation.box((0.8, 1.2, 1.6))
    order = np.argsort(np.abs(mesh.face_normals).argmax(1) * 2 + (mesh.face_normals.sum(1) > 0), kind="stable")
    rows = []
    for side, places in enumerate(mesh.triangles[order].reshape(6, 6, 3)):  # two faces a side
        axes = [axis for axis in range(3) if np.ptp(places[:, axis]) > 0]
        rows.append(np.hstack([places, (np.array([side % 3, side // 3]) + 0.5 + places[:, axes] / 2) / np.array([3, 2])]))
    rows, index = np.unique(np.concatenate(rows), axis=0, return_inverse=True)
    return mesh, (rows[:, :3], index.reshape(-1, 3)), rows[:, 3:]


def test_a_users_own_mesh_keeps_its_faces_its_layout_and_its_seams_are_closed(box):
    mesh, vertices, uv = box
    theta = ColouredMesh(given(mesh, vertices, uv))
    surface = find_surface(theta, 0)
    found = make_mesh(surface, MeshOptions(texture_size=512))
    assert np.array_equal(found.texture.atlas.uv, uv.astype(np.float32))
    assert np.array_equal(found.vertices[found.faces], vertices[0][vertices[1]].astype(np.float32))
    report = describe(found)
    assert (report["num_faces"], report["num_vertices"], report["is_watertight"], report["texture"]["num_charts"]) == (12, 8, True, 6)
    assert found.note == ""
    face, weights, points = anywhere(surface)
    errors = np.abs(found.texture.colors()(face, weights) - color_of(torch.from_numpy(points)).numpy())
    assert errors.max() < 1 / 255 + 1.2 * 2 / found.texture.texels_per_unit * 3  # a texel is three times as wide one way
    assert what_was_lost(found, theta, CameraConfig(), 64, None, "a box")["psnr_db"] > 40


def test_a_layout_that_does_not_serve_or_fewer_faces_get_a_new_one_and_that_is_told(box):
    mesh, vertices, uv = box
    spread = make_mesh(find_surface(ColouredMesh(given(mesh, vertices, uv * 3)), 0), MeshOptions(texture_size=512))
    assert spread.note.startswith("its own places on a texture reach from")
    assert spread.note.endswith("beyond [0, 1]: it gets new ones")
    assert len(spread.faces) == 12
    ring = trimesh.creation.torus(0.5, 0.2, major_sections=32, minor_sections=16)
    uv = unwrap(surface_of(ring))
    theta = ColouredMesh(given(ring, (ring.vertices[uv.vertex], uv.faces), uv.uv))
    fewer = make_mesh(find_surface(theta, 0), MeshOptions(texture_size=512, max_faces=400))
    assert len(fewer.faces) <= 400
    assert fewer.note == "its own places on a texture do not fit fewer faces: it gets new ones"
    enough = make_mesh(find_surface(theta, 0), MeshOptions(texture_size=512, max_faces=5000))
    assert (len(enough.faces), enough.note) == (len(ring.faces), "")


def test_parts_of_a_users_own_mesh_are_no_fragments_and_are_not_made_fewer():
    body, button, hollow = trimesh.creation.icosphere(6, 0.5), trimesh.creation.icosphere(1, 0.01), trimesh.creation.icosphere(2, 0.3)
    button.apply_translation([0.6, 0, 0])
    hollow.invert()
    mesh = trimesh.util.concatenate([body, button, hollow])
    kept = make_mesh(find_surface(ColouredMesh(given(mesh)), 0), MeshOptions(texture_size=0))
    assert (len(kept.faces), kept.num_fragments) == (len(mesh.faces), 0)
    fewer = make_mesh(find_surface(ColouredMesh(given(mesh)), 0), MeshOptions(texture_size=0, max_faces=30_000))
    assert len(fewer.faces) <= 30_000 < len(mesh.faces)


def test_a_missing_xatlas_is_told_with_what_to_do(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install xatlas, or give --texture-size 0"):
        require_xatlas()
