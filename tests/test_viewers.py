"""GLBs as others read them: the Khronos validator, trimesh, and three.js in a browser, whose pictures are to be the particle's own."""


import numpy as np
import pytest
import torch
import trimesh

from dist_vsd.cameras import turntable
from dist_vsd.cli import main
from dist_vsd.export.glb import to_gltf, to_linear, write_glb, write_points_glb
from dist_vsd.export.mesh import MeshOptions, make_mesh
from dist_vsd.export.mesh_report import pictures_on_white, psnr_db
from dist_vsd.export.surface import find_surface
from dist_vsd.particles.particle_configs import DenseGridConfig, RadianceFieldConfig
from dist_vsd.particles.radiance_field import RadianceField
from dist_vsd.runs.saved_run import open_run
from tests.browser import install_chromium
from tests.javascript import Viewer, install, validate
from tests.runs import unavailable

RESOLUTION, SIZE = 64, 96
KINDS = {"texture": 1024, "vertex colours": 0}
CAMERAS = turntable(3, 25.0, 3.0, 40.0)


class Solid(RadianceField):
    """A body with a sharp surface, coloured by angle around z and by height, from dark to light: no two sides are alike."""

    def __init__(self, name):
        config = RadianceFieldConfig(dense_grid=DenseGridConfig(resolutions=(4,)), num_samples=256)
        super().__init__(config, torch.Generator().manual_seed(0))
        self.name = name

    def distance(self, points):
        """Return (N,) signed distances to the surface, scene units."""
        if self.name == "ball":
            return points.norm(dim=-1) - 0.6
        if self.name == "torus":
            return torch.hypot(points[:, :2].norm(dim=-1) - 0.5, points[:, 2]) - 0.22
        return (points.abs() - torch.tensor([0.35, 0.5, 0.25])).amax(-1)

    def forward(self, points):
        angle = torch.atan2(points[:, 1], points[:, 0])
        color = torch.stack([0.5 + 0.45 * (angle - 0.7).cos(), 0.05 + 0.2 * (points[:, 2] + 0.6), 0.5 - 0.45 * (5 * points[:, 2]).sin()], 1)
        return 200 * torch.sigmoid(-self.distance(points) / 0.008), color.clamp(0, 1)


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """The folder that the npm packages lie in."""
    folder = tmp_path_factory.mktemp("node")
    if reason := install(folder):
        unavailable(reason)
    return folder


@pytest.fixture(scope="module")
def viewer(node):
    if reason := install_chromium():
        unavailable(reason)
    viewer = Viewer(node)
    yield viewer
    viewer.close()


@pytest.fixture(scope="module")
def meshes():
    """A mesh of each kind of a torus."""
    surface = find_surface(Solid("torus"), RESOLUTION)
    return {kind: make_mesh(surface, MeshOptions(texture_size=size and 512, max_faces=4000)) for kind, size in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_glb_passes_the_khronos_validator_without_errors_and_warnings(meshes, node, tmp_path, kind):
    write_glb(meshes[kind], tmp_path / "mesh.glb")
    messages, holds = validate(tmp_path / "mesh.glb", node)
    assert messages == []
    assert holds["totalTriangleCount"] == len(meshes[kind].faces)
    assert holds["hasTextures"] == (kind == "texture")


def test_points_pass_the_validator_and_so_does_a_mesh_of_more_vertices_than_short_indices_can_name(node, tmp_path):
    points = np.random.default_rng(0).random((70_000, 3), np.float32)
    write_points_glb(points, points, tmp_path / "points.glb")
    assert validate(tmp_path / "points.glb", node)[0] == []
    mesh = make_mesh(find_surface(Solid("ball"), 200), MeshOptions(texture_size=0))
    assert len(mesh.vertices) > 2**16
    write_glb(mesh, tmp_path / "mesh.glb")
    assert validate(tmp_path / "mesh.glb", node)[0] == []


def test_the_validator_sees_what_is_wrong(meshes, node, tmp_path):
    write_glb(meshes["texture"], tmp_path / "mesh.glb")
    content = (tmp_path / "mesh.glb").read_bytes()
    (tmp_path / "wrong.glb").write_bytes(content.replace(b'"type":"VEC2"', b'"type":"VEC3"'))
    assert validate(tmp_path / "wrong.glb", node)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_trimesh_reads_the_same_faces_bounds_and_colours_back(meshes, tmp_path, kind):
    mesh = meshes[kind]
    write_glb(mesh, tmp_path / "mesh.glb")
    (read,) = trimesh.load(tmp_path / "mesh.glb", process=False).geometry.values()
    upright = to_gltf(mesh.vertices)
    assert np.array_equal(read.triangles.astype(np.float32), upright[mesh.faces])
    assert np.array_equal(read.bounds.astype(np.float32), np.stack([upright.min(0), upright.max(0)]))
    if kind == "texture":
        assert np.array_equal(np.asarray(read.visual.material.baseColorTexture.convert("RGB")), mesh.texture.picture)
        assert (read.visual.material.metallicFactor, read.visual.material.roughnessFactor) == (0.0, 1.0)
        # trimesh counts upwards, glTF downwards.
        assert np.allclose(np.stack([read.visual.uv[:, 0], 1 - read.visual.uv[:, 1]], 1), mesh.texture.atlas.uv, atol=1e-6)
    else:
        read_colors = read.visual.vertex_attributes["color"]
        assert np.allclose(read_colors[:, :3], to_linear(mesh.vertex_colors), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ball", "torus", "box"])
def test_a_browser_shows_the_glb_as_the_particle_is_rendered(viewer, tmp_path, name, kind):
    theta = Solid(name)
    write_glb(make_mesh(find_surface(theta, 96), MeshOptions(texture_size=KINDS[kind])), tmp_path / "mesh.glb")
    own = torch.nn.functional.avg_pool2d(pictures_on_white(theta, CAMERAS, 2 * SIZE)[0], 2)
    psnr = psnr_db(viewer.pictures(tmp_path / "mesh.glb", CAMERAS, SIZE), own)
    print(f"{name}, {kind}: PSNR {psnr:.1f} dB")
    assert psnr >= 28.0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A particle of the embedded prior, trained for a short time and against fog, which no mesh can show."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = ["--num-updates", "80", "--no-turntables", "--wandb.mode", "disabled", "--num-particles", "1", "--preview-every", "1000"]
    fog = ["--field.density-strength", "80", "--regularization.entropy", "100", "--regularization.depth-variance", "100"]
    assert main(["train", "a green duck", *words, *fog, "--objective", "sds", "--run-dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("texture_size", ["1024", "0"])
def test_a_browser_shows_what_the_command_exports_of_a_trained_particle_as_it_is_rendered(viewer, node, trained, tmp_path, texture_size):
    words = ["--format", "glb", "--texture-size", texture_size, "--out", str(tmp_path)]
    assert main(["export", str(trained), *words]) == 0
    assert validate(tmp_path / "mesh_0000.glb", node)[0] == []
    theta = open_run(trained).particles[0]
    own = torch.nn.functional.avg_pool2d(pictures_on_white(theta, CAMERAS, 2 * SIZE)[0], 2)
    psnr = psnr_db(viewer.pictures(tmp_path / "mesh_0000.glb", CAMERAS, SIZE), own)
    print(f"trained particle, texture {texture_size}: PSNR {psnr:.1f} dB")
    assert psnr >= 28.0
