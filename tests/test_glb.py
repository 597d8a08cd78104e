"""A GLB of a ball whose radius and colours are known in closed form."""

import numpy as np
import trimesh

from dist_vsd.export.mesh_files import write_glb
from dist_vsd.export.surface import surface_of
from tests.test_export import CELL, RADIUS, RESOLUTION, THRESHOLD, ball


def test_a_glb_holds_the_surface_with_colours_upright_and_facing_the_viewer(tmp_path):
    surface = surface_of(ball(), "mesh", RESOLUTION, THRESHOLD)
    write_glb(surface, tmp_path / "deep" / "mesh.glb")
    (mesh,) = trimesh.load(tmp_path / "deep" / "mesh.glb", process=False).geometry.values()
    assert len(mesh.vertices) == len(surface.vertices)
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - RADIUS).max() < CELL
    # Red grows with our x (the front), green with y (its left), blue with z (up); glTF's front is z, its up y.
    right, up, front = mesh.vertices.T
    colors = mesh.visual.vertex_attributes["color"][:, :3] / 255
    assert np.abs(colors - (np.stack([front, right, up], 1) + 1) / 2).max() < 0.01
