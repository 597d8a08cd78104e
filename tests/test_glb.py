"""A GLB of a ball whose radius and colours are known in closed form."""

import numpy as np
import pytest
import trimesh

from dist_vsd.export.glb import write_glb
from tests.test_export import CELL, RADIUS, RESOLUTION, THRESHOLD, ball


def test_a_glb_holds_the_surface_with_colours_upright_and_facing_the_viewer(tmp_path):
    count = write_glb(ball(), tmp_path / "deep" / "mesh.glb", RESOLUTION, THRESHOLD)
    (mesh,) = trimesh.load(tmp_path / "deep" / "mesh.glb", process=False).geometry.values()
    assert len(mesh.vertices) == count
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - RADIUS).max() < CELL
    # Red grows with our x (the front), green with y (its left), blue with z (up); glTF's front is z, its up y.
    right, up, front = mesh.vertices.T
    colors = mesh.visual.vertex_colors[:, :3] / 255
    assert np.abs(colors - (np.stack([front, right, up], 1) + 1) / 2).max() < 0.01


def test_nothing_dense_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing is denser"):
        write_glb(ball(), tmp_path / "mesh.glb", RESOLUTION, 1e6)
    assert list(tmp_path.iterdir()) == []
