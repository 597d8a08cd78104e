"""`dist-vsd export`: PLY and GLB of a run, and a resolution that suits the field."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import trimesh

from dist_vsd.cli import main
from dist_vsd.config import CameraConfig, RunConfig
from dist_vsd.export.glb import to_gltf
from dist_vsd.export.resolution import LEAST_SIDE, MOST_POINTS, MOST_SIDE, Resolution, pixels_across, suitable_resolution
from dist_vsd.export.surface import find_surface
from dist_vsd.particles.iso_level import density_volume
from dist_vsd.particles.particle_configs import HashGridConfig, RadianceFieldConfig
from dist_vsd.particles.radiance_field import RadianceField
from dist_vsd.runs.saved_run import open_run
from tests.runs import TINY
from tests.test_export import RESOLUTION, THRESHOLD, ball

PLENTY = 2**40
# Four triangles that fill the quarters of a texture but for a border; v upwards, as trimesh has it.
QUARTERS = np.array([[0.0, 0.0], [0.5, 0.0], [0.0, 0.5], [0.5, 0.5]])
UV = (QUARTERS[:, None] + [[0.05, 0.05], [0.45, 0.05], [0.05, 0.45]]).reshape(-1, 2)
NEAR = CameraConfig(distance=(1.0, 2.0), fov_deg=(90.0, 90.0))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A finished run of two small fields."""
    folder = tmp_path_factory.mktemp("fields") / "run"
    assert main(["train", "a green duck", *TINY, "--objective", "sds", "--wandb.mode", "disabled", "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def object_dir(tmp_path_factory):
    """A run of a field that becomes a mesh, and is painted: a stage an update."""
    folder = tmp_path_factory.mktemp("object") / "run"
    words = ["--preset", "object", *TINY[2:], "--num-particles", "1", "--mesh.resolution", "16", "--wandb.mode", "disabled"]
    stages = ["--stage", *(f"{name}.num_updates=1" for name in ("coarse", "geometry", "texture"))]
    assert main(["train", "a green duck", *words, *stages, "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def painted_dir(tmp_path_factory):
    """A run of a user's own tetrahedron with places on a texture, each face a corner of it, whose colours alone learn."""
    folder = tmp_path_factory.mktemp("painted")
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], float)
    vertices = corners[[[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]]].reshape(-1, 3)
    visual = trimesh.visual.TextureVisuals(uv=UV)
    trimesh.Trimesh(vertices, np.arange(12).reshape(4, 3), visual=visual, process=False).export(folder / "own.glb")
    words = ["--preset", "object", "--stages", "texture", *TINY[2:], "--num-particles", "1", "--wandb.mode", "disabled"]
    stage = ["--stage", "texture.num_updates=1", "--mesh.resolution", "8", "--init-mesh", str(folder / "own.glb")]
    assert main(["train", "a green duck", *words, *stage, "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


def test_every_format_is_written_of_the_same_surface_and_what_was_chosen_is_told(run_dir, tmp_path, capsys):
    words = ["--format", "glb,obj,ply,mp4,gif,png", "--particles", "1", "--texture-size", "512", "--max-faces", "3000"]
    assert main(["export", str(run_dir), *words, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "particle 1: --resolution 32 (2 cells for each of the 16 vertices a side of its finest grid), --threshold" in printed
    names = ["glb", "json", "mtl", "obj", "ply"]
    turns = [f"turntable_0001.{kind}" for kind in ("gif", "mp4", "png")]
    assert sorted(file.name for file in tmp_path.iterdir()) == [*(f"mesh_0001.{n}" for n in names), "mesh_0001_texture.png", *turns]
    ply = trimesh.load(tmp_path / "mesh_0001.ply", process=False)
    (glb,) = trimesh.load(tmp_path / "mesh_0001.glb", process=False).geometry.values()
    obj = trimesh.load(tmp_path / "mesh_0001.obj", process=False)
    upright = to_gltf(ply.triangles.reshape(-1, 3)).reshape(-1, 3, 3)
    assert np.allclose(glb.triangles, upright, atol=1e-6)
    assert np.allclose(obj.triangles, upright, atol=1e-5)
    assert np.allclose(obj.visual.uv[obj.faces], glb.visual.uv[glb.faces], atol=1e-5)
    pictures = [np.asarray(image.convert("RGB")) for image in (obj.visual.material.image, glb.visual.material.baseColorTexture)]
    assert np.array_equal(*pictures)
    assert ply.is_watertight


def test_a_report_says_what_the_mesh_is_and_what_was_lost(run_dir, tmp_path, capsys):
    assert main(["export", str(run_dir), "--particles", "0", "--format", "glb", "--texture-size", "512", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "mesh_0000.json").read_text())
    (glb,) = trimesh.load(tmp_path / "mesh_0000.glb", process=False).geometry.values()
    assert (report["num_faces"], report["is_watertight"], report["particle"], report["update"]) == (len(glb.faces), True, 0, 8)
    assert np.allclose(to_gltf(np.array(report["bounds"]))[:, [0, 1, 2]], glb.bounds, atol=1e-4)
    assert report["area"] == pytest.approx(glb.area, rel=1e-3)
    texture, lost = report["texture"], report["lost"]
    # Texels on the surface, counted two ways.
    assert texture["texels_per_unit"] ** 2 * report["area"] == pytest.approx(texture["coverage"] * 512**2, rel=1e-3)
    assert lost["psnr_db"] > 15
    assert lost["silhouette_iou"] > 0.9
    assert -1 <= lost["clip_mesh"] <= 1
    assert f"PSNR {lost['psnr_db']:.1f} dB" in printed
    assert f"--threshold {report['threshold']:.3g}" in printed


def test_a_mesh_is_written_in_every_format_as_the_surface_that_it_is_and_nearly_nothing_is_lost(object_dir, tmp_path, capsys):
    assert main(["export", str(object_dir), "--format", "glb,obj,ply,png", "--texture-size", "512", "--out", str(tmp_path)]) == 0
    assert "particle 0: its own surface\n" in capsys.readouterr().out
    names = [*(f"mesh_0000.{n}" for n in ("glb", "json", "mtl", "obj", "ply")), "mesh_0000_texture.png", "turntable_0000.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    vertices, faces = (tensor.detach().numpy() for tensor in open_run(object_dir).particles[0].surface())
    ply = trimesh.load(tmp_path / "mesh_0000.ply", process=False)
    assert np.allclose(ply.triangles, vertices[faces], atol=1e-6)
    report = json.loads((tmp_path / "mesh_0000.json").read_text())
    assert (report["num_faces"], report["is_watertight"], report["texture"]["size"]) == (len(faces), True, 512)
    assert report["lost"]["psnr_db"] > 40
    assert report["lost"]["silhouette_iou"] > 0.995


def test_a_mesh_is_made_lighter_or_points(object_dir, tmp_path, capsys):
    words = ["--texture-size", "0", "--max-faces", "300", "--format", "glb", "--out", str(tmp_path)]
    assert main(["export", str(object_dir), *words]) == 0
    report = json.loads((tmp_path / "mesh_0000.json").read_text())
    assert report["num_faces"] <= 300 < report["num_faces_found"]
    assert report["lost"]["psnr_db"] > 28
    assert main(["export", str(object_dir), "--kind", "points", "--out", str(tmp_path)]) == 0
    assert len(trimesh.load(tmp_path / "points_0000.ply").vertices) == len(open_run(object_dir).particles[0].surface()[0])


def test_of_an_earlier_stage_the_field_is_exported(object_dir, tmp_path, capsys):
    assert main(["export", f"{object_dir}@coarse", "--out", str(tmp_path)]) == 0
    assert "--resolution 32 (2 cells for each of the 16 vertices a side of its finest grid), --threshold" in capsys.readouterr().out
    assert json.loads((tmp_path / "mesh_0000.json").read_text())["update"] == 1


def test_a_users_own_mesh_keeps_its_faces_and_its_places_on_a_texture(painted_dir, tmp_path, capsys):
    assert main(["export", str(painted_dir), "--format", "glb", "--texture-size", "512", "--out", str(tmp_path)]) == 0
    assert "particle 0: the mesh that it began from\n" in capsys.readouterr().out
    (glb,) = trimesh.load(tmp_path / "mesh_0000.glb", process=False).geometry.values()
    assert np.allclose(glb.visual.uv, UV, atol=1e-6)
    report = json.loads((tmp_path / "mesh_0000.json").read_text())
    assert (report["num_faces"], report["num_vertices"], report["is_watertight"], report["texture"]["num_charts"]) == (4, 4, True, 4)
    assert report["lost"]["psnr_db"] > 28


@pytest.mark.parametrize(
    ("stage", "words", "fragment"),
    [
        ("@colours", [], "has no stage 'colours', it has coarse, geometry, texture: change what stands after the @"),
        ("@geometry", [], "checkpoint update_00000002 can't be shown (manifest.json is missing or unreadable): choose another update"),
        ("", ["--resolution", "40"], "holds mesh particles, --resolution is for the surface of a field: leave it out"),
        ("", ["--threshold", "5"], "holds mesh particles, --threshold is for the surface of a field: leave it out"),
    ],
)
def test_a_stage_that_is_not_there_or_a_flag_that_says_nothing_of_a_mesh_is_refused_in_one_line(
    object_dir, tmp_path, capfd, stage, words, fragment
):
    shutil.copytree(object_dir, tmp_path / "run", ignore=lambda *_: ["update_00000002"])
    assert main(["export", f"{tmp_path}/run{stage}", *words, "--out", str(tmp_path / "out")]) == 2
    errors = capfd.readouterr().err
    assert len(errors.splitlines()) == 1
    assert fragment in errors
    assert not (tmp_path / "out").exists()


def test_ply_alone_is_the_default_and_a_resolution_that_is_given_holds(run_dir, tmp_path, capsys):
    assert main(["export", str(run_dir), "--particles", "1", "--resolution", "20", "--threshold", "5", "--out", str(tmp_path)]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mesh_0001.json", "mesh_0001.ply"]
    assert "particle 1: --resolution 20 --threshold 5\n" in capsys.readouterr().out
    edges = trimesh.load(tmp_path / "mesh_0001.ply").bounding_box.extents / (2 / 20)
    assert (edges < 20).all()


def test_points_can_be_a_glb_too(run_dir, tmp_path):
    words = ["--format", "glb", "--kind", "points", "--threshold", "5", "--particles", "0", "--out", str(tmp_path)]
    assert main(["export", str(run_dir), *words]) == 0
    (cloud,) = trimesh.load(tmp_path / "points_0000.glb").geometry.values()
    assert isinstance(cloud, trimesh.PointCloud)
    assert len(cloud.vertices) > 100


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--format", "ply,gbl"], "one of glb, obj, ply, mp4, gif, png, or several with commas, got 'gbl' (did you mean glb?)"),
        (["--format", "ply,"], "got ''"),
        (["--format", ""], "got ''"),
        (["--resolution", "-1"], "--resolution must be at least 2, got -1: leave it out for one that suits"),
        (["--resolution", "1000000"], "--resolution 1000000 can't fit"),
        (["--threshold", "nan"], "--threshold must be positive, or 0 for the one that suits, got nan"),
        (["--threshold", "1e6"], "has no surface: nothing is denser than --threshold 1e+06"),
        (["--texture-size", "100"], "--texture-size must be 512 to 4096, or 0 for colours at vertices, got 100"),
        (["--max-faces", "2"], "--max-faces must be at least 4, or 0 for as many as suit, got 2"),
        (["--kind", "points", "--format", "obj"], "--kind points needs --format glb or ply, got obj: change either"),
    ],
)
def test_a_format_or_a_resolution_that_is_none_is_refused_in_one_line(run_dir, tmp_path, capfd, words, fragment):
    assert main(["export", str(run_dir), *words, "--out", str(tmp_path / "out")]) == 2
    errors = capfd.readouterr().err
    assert len(errors.splitlines()) == 1
    assert fragment in errors
    assert not (tmp_path / "out").exists()


def test_a_pixel_of_the_nearest_narrowest_camera_is_counted_across_the_cube():
    # At distance 1 with 90 degrees a picture shows 2 units of the plane through the origin: the cube's side.
    assert pixels_across(RunConfig(prompt="x", camera=NEAR, render_size=64)) == 64


def test_a_detail_is_no_smaller_than_the_grid_nor_than_a_pixel():
    field, config = ball(), RunConfig(prompt="x", camera=NEAR, render_size=64)
    assert suitable_resolution(field, config, PLENTY) == Resolution(LEAST_SIDE, "fewer show nothing")  # its grid has 4 vertices a side
    field.encoding.finest_resolution = 48
    chosen = suitable_resolution(field, dataclasses.replace(config, render_size=10), PLENTY)
    assert (chosen.cells, "10 pixels" in chosen.why) == (20, True)
    chosen = suitable_resolution(field, config, PLENTY)
    assert (chosen.cells, "48 vertices" in chosen.why) == (96, True)
    grid = HashGridConfig(num_levels=2, log2_table_size=4, base_resolution=4, finest_resolution=300)
    hashed = RadianceField(RadianceFieldConfig(encoding="hash", hash_grid=grid), torch.Generator().manual_seed(0))
    assert suitable_resolution(hashed, config, PLENTY).cells == 128  # of 64 pixels


def test_an_object_that_fills_little_of_the_cube_is_sampled_more_finely():
    field, config = ball(), RunConfig(prompt="x", camera=NEAR, render_size=512)
    field.encoding.finest_resolution = 2048
    full = suitable_resolution(field, config, PLENTY)
    assert full.cells == int(MOST_POINTS["cpu"] ** (1 / 3))
    assert "100% of the cube" in full.why
    field.occupancy.binaries.fill_(False)
    field.occupancy.binaries[0, :16, :16, :16] = True  # an eighth
    eighth = suitable_resolution(field, config, PLENTY)
    assert eighth.cells == pytest.approx(2 * full.cells, abs=1)
    field.occupancy.binaries.fill_(False)
    assert suitable_resolution(field, config, PLENTY).cells == MOST_SIDE
    assert "half of the free memory" in suitable_resolution(field, config, 2 * 16 * 50**3 + 1000).why


def test_density_is_asked_only_where_the_field_is_rendered():
    field = ball()
    assert density_volume(field, 8).min() > 0
    field.occupancy.binaries.fill_(False)
    field.occupancy.binaries[0, 16:] = True  # x > 0
    volume = density_volume(field, 8)
    assert volume[:4].abs().max() == 0
    assert torch.equal(volume[4:], density_volume(ball(), 8)[4:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_surface_found_on_a_gpu_is_the_cpus():
    on_cpu, on_gpu = (find_surface(ball().to(device), RESOLUTION, THRESHOLD) for device in ("cpu", "cuda"))
    assert np.allclose(on_cpu.vertices, on_gpu.vertices, atol=1e-4)
    assert np.allclose(on_cpu.colors_at(on_cpu.vertices), on_gpu.colors_at(on_cpu.vertices), atol=1e-3)
