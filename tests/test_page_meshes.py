"""The meshes of a page: light copies of what runs leave, and which of them the page holds."""

import os
import time

import numpy as np
import pytest
import trimesh

from dist_vsd.export.glb import to_gltf, to_srgb
from dist_vsd.export.light_glb import write_light_glb
from dist_vsd.sweep.page_meshes import MOST_FACES, meshes_of
from tests.synthetic_sweep import ball_colors, write_ball

CENTER, RADIUS = (0.0, 0.1, 0.2), 0.6


@pytest.mark.parametrize("texture_size", [0, 512], ids=["vertex colours", "texture"])
def test_a_light_copy_has_few_faces_and_the_same_shape_and_colours(tmp_path, texture_size):
    write_ball(tmp_path / "mesh.glb", num_subdivisions=4, texture_size=texture_size, center=CENTER, radius=RADIUS)
    write_light_glb((tmp_path / "mesh.glb").read_bytes(), 800, tmp_path / "light.glb")
    (light,) = trimesh.load(tmp_path / "light.glb", process=False).geometry.values()
    assert len(light.faces) <= 800 < 5120
    assert light.is_watertight
    from_center = light.vertices - to_gltf(np.array([CENTER]))
    assert np.linalg.norm(from_center, axis=1) == pytest.approx(RADIUS, abs=0.01)
    assert light.volume == pytest.approx(4 / 3 * np.pi * RADIUS**3, rel=0.02)
    colors = to_srgb(light.visual.vertex_attributes["color"][:, :3])
    directions = from_center[:, [2, 0, 1]] / RADIUS
    assert np.abs(colors - ball_colors(directions)).max() < 0.06  # of the nearest vertex, half an edge of 0.08 radii away; and a texel
    assert (tmp_path / "light.glb").stat().st_size < 20 * 800


@pytest.mark.parametrize("content", [b"", b"glTF", b"x" * 100, None], ids=["empty", "a word", "something else", "cut off"])
def test_what_holds_no_mesh_is_refused(tmp_path, content):
    write_ball(tmp_path / "mesh.glb", num_subdivisions=1)
    with pytest.raises(ValueError, match="it is no GLB of a mesh"):
        write_light_glb((tmp_path / "mesh.glb").read_bytes()[:1000] if content is None else content, 100, tmp_path / "light.glb")


@pytest.fixture
def runs(tmp_path):
    """Four runs: of two particles, of one whose file is damaged, of none, of one."""
    folders = [tmp_path / "s" / "runs" / name for name in ("two", "damaged", "none", "one & only")]
    for folder in folders:
        (folder / "export").mkdir(parents=True)
    write_ball(folders[0] / "export" / "mesh_0003.glb", num_subdivisions=1)
    write_ball(folders[0] / "export" / "mesh_0012.glb", num_subdivisions=1)
    (folders[1] / "export" / "mesh_0000.glb").write_bytes(b"glTF")
    write_ball(folders[3] / "export" / "mesh_0000.glb", num_subdivisions=1)
    return folders


def test_a_page_holds_every_mesh_that_can_be_read_where_there_is_room(runs, tmp_path):
    found = meshes_of(runs, tmp_path / "s" / "results", 1 << 20)
    assert [[mesh.particle for mesh in of_run] for of_run in found] == [[3, 12], [], [], [0]]
    assert all(mesh.glb[:4] == b"glTF" for of_run in found for mesh in of_run)


def test_each_run_s_first_particle_comes_before_any_second_and_the_rest_are_links(runs, tmp_path):
    size = 4 * len(meshes_of(runs, tmp_path, 1 << 20)[0][0].glb) / 3
    found = meshes_of(runs, tmp_path / "s" / "results", int(2.5 * size))
    assert [[mesh.glb is not None for mesh in of_run] for of_run in found] == [[True, False], [], [], [True]]
    assert found[0][1].link == "../runs/two/export/mesh_0012.glb"
    links = meshes_of(runs, tmp_path / "s" / "results", 0)
    assert [[mesh.glb for mesh in of_run] for of_run in links] == [[None, None], [None], [], [None]]  # nothing is read
    assert links[3][0].link == "../runs/one%20%26%20only/export/mesh_0000.glb"


def test_a_copy_is_kept_until_the_mesh_changes(runs, tmp_path):
    export = runs[3] / "export"
    first = meshes_of(runs, tmp_path, 1 << 20)
    cache = export / f"preview_mesh_0000_{MOST_FACES}.glb"
    written = cache.stat().st_mtime_ns
    assert meshes_of(runs, tmp_path, 1 << 20) == first
    assert cache.stat().st_mtime_ns == written
    write_ball(export / "mesh_0000.glb", num_subdivisions=2)
    os.utime(export / "mesh_0000.glb", (time.time() + 10,) * 2)
    assert len(meshes_of(runs, tmp_path, 1 << 20)[3][0].glb) > len(first[3][0].glb)
