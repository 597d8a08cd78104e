"""`dist-vsd export`: PLY and GLB of a run, and a resolution that suits the field."""

import dataclasses
import json

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
from tests.runs import TINY
from tests.test_export import RESOLUTION, THRESHOLD, ball

PLENTY = 2**40
NEAR = CameraConfig(distance=(1.0, 2.0), fov_deg=(90.0, 90.0))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A finished run of two small fields."""
    folder = tmp_path_factory.mktemp("fields") / "run"
    assert main(["train", "a green duck", *TINY, "--objective", "sds", "--wandb.mode", "disabled", "--run-dir", str(folder)]) == 0
    return folder


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
