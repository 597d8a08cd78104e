"""A user's mesh: read as it stands, put into the cube, and turned into distances whose surface is the same."""

import numpy as np
import pytest
import torch
import trimesh

from dist_vsd.particles.given_mesh import distances_to, read_mesh
from dist_vsd.particles.mesh_start import lattice_points
from tests.test_mesh import CELL, as_mesh, ball

R = 24


def given(mesh, tmp_path, name="mesh.ply"):
    mesh.export(tmp_path / name)
    return read_mesh(tmp_path / name, 1.0)


def refined(mesh):
    theta = ball()
    theta.begin_from_mesh(mesh, is_refined=True)
    return as_mesh(theta)


@pytest.mark.parametrize(
    ("name", "size"), [("box.ply", (1.6, 0.8, 0.4)), ("box.obj", (0.4, 1.6, 0.8)), ("box.glb", (0.4, 1.6, 0.8))]
)
def test_a_file_fills_the_cube_and_stands_upright(tmp_path, name, size):
    """A box whose longest side is x: to the front in PLY, in glTF and OBJ to the side (their front is z, their up y)."""
    box = trimesh.creation.box((3.0, 1.5, 0.75))
    box.apply_translation((5.0, 0.0, -2.0))
    vertices = given(box, tmp_path, name).vertices
    assert torch.allclose(vertices.amax(0), torch.tensor(size) / 2, atol=1e-5)
    assert torch.allclose(vertices.amin(0), -torch.tensor(size) / 2, atol=1e-5)


def test_parts_of_a_scene_are_one_mesh_where_they_stand(tmp_path):
    one, other = trimesh.creation.box((1, 1, 1)), trimesh.creation.box((1, 1, 1))
    scene = trimesh.Scene([one])
    scene.add_geometry(other, transform=trimesh.transformations.translation_matrix((3, 0, 0)))
    mesh = given(scene, tmp_path, "scene.glb")
    assert len(mesh.faces) == 24
    assert torch.allclose(mesh.vertices.amax(0), torch.tensor([0.2, 0.8, 0.2]), atol=1e-5)


def test_places_on_a_texture_are_kept_with_v_downwards(tmp_path):
    uv = np.array([[0, 0], [1, 0], [1, 1], [0, 0.25]], float)
    visual = trimesh.visual.TextureVisuals(uv=uv)
    sheet = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]], visual=visual, process=False)
    mesh = given(sheet, tmp_path, "sheet.glb")
    assert torch.allclose(mesh.uv, torch.tensor([[0, 1], [1, 1], [1, 0], [0, 0.75]]), atol=1e-5)
    assert given(trimesh.creation.box(), tmp_path).uv.shape == (0, 2)


@pytest.mark.parametrize("shape", ["box", "ring", "two boxes"])
def test_a_closed_mesh_keeps_its_volume_on_the_lattice(tmp_path, shape):
    parts = {
        "box": [trimesh.creation.box((1.0, 0.7, 0.5))],
        "ring": [trimesh.creation.torus(0.5, 0.2)],
        "two boxes": [trimesh.creation.box((0.4, 0.4, 0.4)), trimesh.creation.box((0.4, 0.4, 0.4))],
    }[shape]
    if shape == "two boxes":
        parts[1].apply_translation((0.8, 0, 0))
    mesh = given(trimesh.util.concatenate(parts), tmp_path)
    expected = trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy())
    found = refined(mesh)
    assert found.is_watertight
    assert found.volume == pytest.approx(expected.volume, rel=0.06)  # edges are cut by up to a cell
    assert np.abs(found.bounds - expected.bounds).max() < CELL


def test_a_sheet_becomes_a_thin_solid_and_a_box_without_a_lid_is_no_block(tmp_path):
    sheet = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]])
    thin = refined(given(sheet, tmp_path))
    assert thin.is_watertight
    assert 0.2 * CELL < thin.volume / 1.6**2 < 2 * CELL
    box = trimesh.creation.box((1, 1, 1))
    box.update_faces(box.face_normals[:, 2] < 0.5)
    mesh = given(box, tmp_path)
    assert refined(mesh).volume < 0.5 * 1.6**3


def test_what_a_closed_surface_holds_is_inside(tmp_path):
    distances = distances_to(given(trimesh.creation.icosphere(radius=1.0), tmp_path), R, 1.0)
    radius = lattice_points(R, 1.0).norm(dim=-1).reshape(distances.shape)
    clear = (radius - 0.8).abs() > 0.5 * CELL
    assert torch.equal(distances[clear] < 0, radius[clear] < 0.8)
    near = (radius - 0.8).abs() < CELL
    assert ((distances * CELL - (radius - 0.8))[near].abs() < 0.15 * CELL).all()
