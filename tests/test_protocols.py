"""What other benchmarks take: cameras against their formulas, normals against a ball's, folders that are whole or not there."""

import json
import math
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import trimesh

from dist_vsd.cameras import cast_rays
from dist_vsd.config import CameraConfig
from dist_vsd.evaluation.protocols import gpteval3d, t3bench
from dist_vsd.evaluation.protocols.folders import BESIDE, Folder, digest_of, saved_record, slots_of, write_pictures
from dist_vsd.evaluation.protocols.prompt_set import place_of, read_prompt_set
from dist_vsd.normal_maps import color_normals
from dist_vsd.particles.particle_configs import RadianceFieldConfig
from dist_vsd.rasterization.rasterize import rasterize
from tests.coloured_mesh import ColouredMesh, given
from tests.test_channels import RADIUS, a_camera, distances_to_a_ball, hard_ball
from tests.test_radiance_field import empty, make

GOLDEN = (1 + math.sqrt(5)) / 2


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_gpteval3d_goes_around_once_in_120_views_the_first_and_the_last_in_front():
    cameras = gpteval3d.cameras_of(CameraConfig(distance=(2.0, 3.0), fov_deg=(30.0, 50.0)))
    azimuth, elevation = torch.arange(120) * math.tau / 119, math.radians(15)
    flat = 2.5 * math.cos(elevation)
    places = torch.stack([flat * azimuth.cos(), flat * azimuth.sin(), torch.full((120,), 2.5 * math.sin(elevation))], -1)
    torch.testing.assert_close(cameras.c2w[:, :3, 3], places, rtol=0, atol=1e-5)  # fp32 degrees up to 360
    assert torch.equal(cameras.fov, torch.full((120,), 40.0).deg2rad())


def test_t3bench_stands_on_the_vertices_of_an_icosahedron_with_five_focal_lengths_each():
    center, scale = torch.tensor([0.3, -0.2, 0.1]), 0.7
    cameras = t3bench.cameras_around(center, scale, 0, 2.2, t3bench.FOVS_DEG)
    places = ((cameras.c2w[:, :3, 3] - center) / (2.2 * scale)).double().view(12, 5, 3)
    corners = [p for a in (-1, 1) for b in (-GOLDEN, GOLDEN) for p in ((0, a, b), (a, b, 0), (b, 0, a))]
    corners = torch.tensor(corners, dtype=torch.float64) / math.sqrt(1 + GOLDEN**2)
    assert torch.cdist(places[:, 0], corners).min(1).values.max() < 1e-6
    assert torch.cdist(places[:, 0], corners).argmin(1).unique().numel() == 12
    assert (places - places[:, :1]).abs().max() < 1e-6
    torch.testing.assert_close(torch.rad2deg(cameras.fov).view(12, 5), torch.tensor([[60.0, 45, 36, 30, 24]]).expand(12, 5))


def test_t3bench_cameras_look_at_the_object_with_z_up_and_from_above_and_below_with_y_up():
    cameras = t3bench.cameras_around(torch.zeros(3), 1.0, t3bench.SUBDIVISIONS, 2.2, (60.0,))
    right, up, backward, place = cameras.c2w[:, :3].unbind(-1)
    assert len(cameras) == 162
    torch.testing.assert_close(place, 2.2 * torch.tensor(trimesh.creation.icosphere(2).vertices).float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(2.2 * backward, place, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.cross(right, up), backward, rtol=0, atol=1e-5)
    is_pole = backward[:, 2].abs() > 0.99
    assert is_pole.sum() == 2
    torch.testing.assert_close(up[is_pole], torch.tensor([[0.0, 1, 0]]).expand(2, 3), rtol=0, atol=1e-5)
    assert (right[~is_pole, 2].abs() < 1e-6).all()
    assert (up[~is_pole, 2] > 0).all()


def test_the_pictures_are_numbered_as_each_benchmark_numbers_them():
    views, captions = t3bench.view_names(), t3bench.caption_names()
    assert (len(views), views[0], views[7], views[-1]) == (810, "000_0.png", "001_2.png", "161_4.png")
    assert (len(captions), captions[0], captions[-1]) == (12, "000.png", "011.png")
    name = t3bench.folder_name(t3bench.MESHES, "ours", "surr", "A cat on a mat", 1)
    assert name == "seed_1/outputs_mesh_t3/ours_surr/A_cat_on_a_mat"
    assert gpteval3d.folder_name("ours", 17, 0) == "ours/17/0"


def test_normals_become_the_worlds_on_black_whatever_they_were_composited_on():
    camera, normal, opacity = a_camera(), unit(1, 5, 7, 3), torch.rand(1, 5, 7, 1, generator=torch.Generator().manual_seed(1))
    shown = color_normals(opacity * normal, camera.c2w[:, None, None], opacity)
    found = gpteval3d.color_normals_of_world(shown.movedim(-1, 1), opacity.movedim(-1, 1), camera.c2w)
    expected = (opacity * (normal + 1) / 2).movedim(-1, 1)
    is_seen = (opacity > 0.01).movedim(-1, 1).expand_as(expected)  # below, fp32 has lost the direction, of which 1 % is shown
    torch.testing.assert_close(found[is_seen], expected[is_seen], rtol=0, atol=1e-4)


def test_the_normals_of_a_ball_are_its_directions_from_the_centre():
    camera, size = a_camera(), 33
    render = hard_ball().render(camera, size)
    found = gpteval3d.color_normals_of_world(render.channel("normal"), render.opacity, camera.c2w)
    origins, directions = (ray.view(1, size, size, 3).movedim(-1, 1) for ray in cast_rays(camera, size, size))
    hit = origins + directions * distances_to_a_ball(camera, size, RADIUS)
    expected = torch.where(hit.isnan(), 0.0, (hit / RADIUS + 1) / 2)
    inside = (hit - origins).norm(dim=1, keepdim=True) < 3.0 - 0.3 * RADIUS  # at the rim a ray grazes the ball's soft edge
    assert inside.sum() > 50
    assert (found - expected).abs().mul(inside).max() < 0.05
    assert torch.equal(found[..., 0, 0], torch.zeros(1, 3))


def written_mesh(theta, folder):
    """Write a particle's mesh, and read it as T3Bench does: moved to its vertices' mean and scaled by its largest coordinate."""
    config = SimpleNamespace(camera=CameraConfig(), render_size=32, field=RadianceFieldConfig())
    t3bench.write_mesh(folder, theta, config, 7, 2**30)
    (file,) = folder.path.glob("save/it7-export/model.obj")
    mesh = trimesh.load(file)
    assert type(mesh) is trimesh.Trimesh
    vertices = mesh.vertices - mesh.vertices.mean(0)
    return mesh, torch.tensor(vertices / np.abs(vertices).max(), dtype=torch.float32)


@pytest.mark.parametrize("kind", ["mesh", "field"])
def test_a_view_shows_what_t3benchs_formula_sees_of_the_mesh_that_is_written(kind, tmp_path):
    """Theirs: from 2.2 v at the mesh that was moved and scaled; ours: the particle where it is, from cameras that are moved and scaled."""
    pytest.importorskip("xatlas", reason="no wheel of xatlas for this Python")
    box = trimesh.creation.box((0.9, 0.5, 0.3), trimesh.transformations.translation_matrix((0.1, 0.2, -0.3)))
    theta = ColouredMesh(given(box)) if kind == "mesh" else hard_ball(num_samples=64)
    folder = Folder(tmp_path, "mesh", {"owner": "a"})
    mesh, vertices = written_mesh(theta, folder)
    assert mesh.visual.material.image.size == (1024, 1024)
    placed = t3bench.place_of_mesh(folder.path)
    chosen = [1, 18, 33, 57]  # of several corners and focal lengths
    theirs = t3bench.cameras_around(torch.zeros(3), 1.0, 0, 2.2, t3bench.FOVS_DEG)[chosen]
    ours = t3bench.cameras_around(*placed, 0, 2.2, t3bench.FOVS_DEG)[chosen]
    covered = rasterize(vertices, torch.tensor(mesh.faces), theirs, 48).is_hit
    seen = theta.render(ours, 48).opacity[:, 0] > 0.5
    assert covered.sum() > 1000
    # The field's edge is soft by 0.03 of 0.6; of the mesh, a pixel on an edge may go either way.
    assert (covered & seen).sum() > {"mesh": 0.99, "field": 0.95}[kind] * (covered | seen).sum()


def test_a_particle_without_a_surface_is_black_pictures(tmp_path):
    theta = empty(make())
    config = SimpleNamespace(camera=CameraConfig(), render_size=32, field=theta.config)
    meshes, views, captions = (Folder(tmp_path, name, {"owner": "a"}) for name in ("meshes", "views", "captions"))
    t3bench.write_mesh(meshes, theta, config, 1, 2**30)
    assert t3bench.why_no_mesh(meshes)
    assert t3bench.place_of_mesh(meshes.path) is None
    told = []
    t3bench.write_all_views(meshes, views, captions, theta, 2, lambda: told.append(1))
    assert (len(told), len(list(views.path.iterdir())), len(list(captions.path.iterdir()))) == (822, 810, 12)
    assert not any(iio.imread(folder.path / name).any() for folder, name in ((views, "161_4.png"), (captions, "000.png")))


def pictures_of(numbers):
    return lambda number: (numbers.append(number) or torch.full((1, 3, 2, 2), number / 255),)


def write(folder, rendered, stop_after=9):
    """Write five pictures into a folder, or fewer and fail."""

    def tell():
        if len(rendered) == stop_after:
            raise KeyboardInterrupt

    write_pictures(folder, [(f"{number}.png",) for number in range(5)], pictures_of(rendered), tell)


def test_a_folder_is_not_there_until_it_is_complete_and_goes_on_where_it_stopped(tmp_path):
    folder, rendered = Folder(tmp_path, "a/0", {"owner": "x", "update": 4}), []
    with pytest.raises(KeyboardInterrupt):
        write(folder, rendered, stop_after=3)
    assert not (tmp_path / "a").exists()
    assert not folder.is_complete()
    write(folder, rendered)
    assert rendered == [0, 1, 2, 3, 4], "none twice"
    assert folder.is_complete()
    assert sorted(file.name for file in folder.path.iterdir()) == [f"{number}.png" for number in range(5)]
    assert not folder.beside.exists()


def test_a_particle_that_went_on_is_rendered_anew_and_the_old_pictures_stay_until_then(tmp_path):
    write(Folder(tmp_path, "a/0", {"owner": "x", "update": 4}), [])
    newer, rendered = Folder(tmp_path, "a/0", {"owner": "x", "update": 8}), []
    assert not newer.is_complete()
    with pytest.raises(KeyboardInterrupt):
        write(newer, rendered, stop_after=3)
    assert not newer.is_complete(), "the pictures are those of before"
    assert len(list(newer.path.iterdir())) == 5
    newest = Folder(tmp_path, "a/0", {"owner": "x", "update": 9})
    write(newest, rendered)
    assert rendered == [0, 1, 2, 0, 1, 2, 3, 4], "what was begun of update 8 is not taken for update 9's"
    assert newest.is_complete()


def test_particles_keep_their_numbers_and_new_ones_get_the_next(tmp_path):
    def slots(*owners):
        return slots_of(tmp_path, "m/{}".format, owners)

    for number, owner in enumerate("ba"):
        write(Folder(tmp_path, f"m/{number}", {"owner": owner}), [])
    assert slots("a", "b", "c", "d") == {"a": 1, "b": 0, "c": 2, "d": 3}
    assert slots("d") == {"d": 2}
    (tmp_path / "m" / "2").mkdir()
    with pytest.raises(ValueError, match="2 is there and was not written by this command"):
        slots("a")
    assert saved_record(tmp_path, "m/0") == {"owner": "b"}
    assert (tmp_path / BESIDE).name.startswith("."), "GPTEval3D takes every other name for a method's"


def test_a_particle_is_known_by_all_that_it_holds():
    assert digest_of(make()) == digest_of(make())
    assert digest_of(make(seed=1)) != digest_of(make())
    assert digest_of(empty(make())) != digest_of(make())


def test_prompts_are_lines_or_a_list_in_json_in_their_order(tmp_path):
    (tmp_path / "prompt_single.txt").write_text("A torn hat\n\n A soft sofa \r\n")
    (tmp_path / "prompts.json").write_text(json.dumps(["A torn hat", "A soft sofa"]))
    for name in ("prompt_single.txt", "prompts.json"):
        assert read_prompt_set(tmp_path / name) == ("A torn hat", "A soft sofa")
    assert place_of("A soft sofa", ("A torn hat", "A soft sofa"), "run", "prompts.json") == 1
    with pytest.raises(ValueError, match="run has the prompt 'A soft soft', which --prompts file has not .did you mean 'A soft sofa'"):
        place_of("A soft soft", ("A torn hat", "A soft sofa"), "run", "file")
    assert t3bench.group_of(tmp_path / "prompt_single.txt") == "single"


@pytest.mark.parametrize("prompt", ["a/b", ".hidden", "a [cat]", "what?", "é" * 128])
def test_t3bench_takes_prompts_that_can_be_names_of_folders(prompt):
    t3bench.require_name("A cat's mat, red")
    with pytest.raises(ValueError, match="T3Bench has prompts as names of folders: leave its runs out"):
        t3bench.require_name(prompt)
