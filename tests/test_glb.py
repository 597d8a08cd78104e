"""A GLB of a ball whose radius and colours are known in closed form."""

import numpy as np
import pytest
import trimesh

from dist_vsd.export.glb import to_linear, write_glb
from dist_vsd.export.mesh import MeshOptions, make_mesh
from dist_vsd.export.surface import find_surface
from tests.test_export import CELL, RADIUS, RESOLUTION, THRESHOLD, ball


def test_a_glb_holds_the_surface_with_linear_colours_upright_and_facing_the_viewer(tmp_path):
    written = make_mesh(find_surface(ball(), RESOLUTION, THRESHOLD), MeshOptions(texture_size=0))
    write_glb(written, tmp_path / "deep" / "mesh.glb")
    (mesh,) = trimesh.load(tmp_path / "deep" / "mesh.glb", process=False).geometry.values()
    assert len(mesh.vertices) == len(written.vertices)
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - RADIUS).max() < CELL
    # Red grows with our x (the front), green with y (its left), blue with z (up); glTF's front is z, its up y.
    right, up, front = mesh.vertices.T
    colors = mesh.visual.vertex_attributes["color"][:, :3]
    assert np.abs(colors - to_linear((np.stack([front, right, up], 1) + 1) / 2)).max() < 0.01


def test_srgb_becomes_linear_light_as_the_standard_has_it():
    # IEC 61966-2-1: a middle grey of 50 % is 21.4 % of the light; near black the curve is a line of slope 1 / 12.92.
    assert to_linear(np.array([0.0, 0.04, 0.5, 1.0])) == pytest.approx([0.0, 0.04 / 12.92, 0.21404, 1.0], abs=1e-5)


def test_a_glb_has_a_matt_material_without_light_and_normals(tmp_path):
    write_glb(make_mesh(find_surface(ball(), RESOLUTION, THRESHOLD), MeshOptions(texture_size=0)), tmp_path / "ball.glb")
    (mesh,) = trimesh.load(tmp_path / "ball.glb", process=False).geometry.values()
    assert b"KHR_materials_unlit" in (tmp_path / "ball.glb").read_bytes()
    assert (mesh.visual.material.metallicFactor, mesh.visual.material.roughnessFactor) == (0.0, 1.0)
    outwards = (mesh.vertex_normals * mesh.vertices).sum(1) / RADIUS
    assert outwards.min() > 0.95
