"""GLBs as others read them: the Khronos validator, trimesh, and three.js in a browser, whose pictures are to be the particle's own."""

import functools

import numpy as np
import pytest
import torch
import trimesh

from dist_vsd.cameras import turntable
from dist_vsd.cli import main
from dist_vsd.export.glb import to_gltf, to_linear, write_glb, write_points_glb
from dist_vsd.export.mesh import MeshOptions, make_mesh
from dist_vsd.export.mesh_report import pictures_on_white, psnr_db
from dist_vsd.export.surface import Surface, find_surface
from dist_vsd.particles.mesh import MeshParticle
from dist_vsd.particles.particle_configs import DenseGridConfig, MeshConfig, MeshSettings, RadianceFieldConfig
from dist_vsd.particles.radiance_field import RadianceField
from dist_vsd.runs.saved_run import open_run
from tests.browser import install_chromium
from tests.javascript import Viewer, install, validate
from tests.runs import TINY, unavailable

RESOLUTION, SIZE = 64, 64
KINDS = {"texture": 512, "vertex colours": 0}
CAMERAS = turntable(3, 25.0, 3.0, 40.0)


class Solid(RadianceField):
    """A body with a sharp surface, coloured by angle around z and by height, from dark to light: no two sides are alike."""

    def __init__(self, name):
        config = RadianceFieldConfig(dense_grid=DenseGridConfig(resolutions=(4,)), num_samples=256)
        super().__init__(config, torch.Generator().manual_seed(0))
        self.name = name

    def distance(self, points):
        """Return (N,) signed distances to the surface, scene units."""
        if self.name == "torus":
            return torch.hypot(points[:, :2].norm(dim=-1) - 0.5, points[:, 2]) - 0.22
        return (points.abs() - torch.tensor([0.35, 0.5, 0.25])).amax(-1)

    def color_at(self, points):
        angle = torch.atan2(points[:, 1], points[:, 0])
        color = torch.stack([0.5 + 0.45 * (angle - 0.7).cos(), 0.05 + 0.2 * (points[:, 2] + 0.6), 0.5 - 0.45 * (5 * points[:, 2]).sin()], 1)
        return color.clamp(0, 1)

    def forward(self, points):
        return 200 * torch.sigmoid(-self.distance(points) / 0.008), self.color_at(points)


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
    return {kind: make_mesh(surface, MeshOptions(texture_size=size, max_faces=4000)) for kind, size in KINDS.items()}


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
    fine = trimesh.creation.torus(0.5, 0.2, major_sections=400, minor_sections=200)
    surface = Surface(fine.vertices.astype(np.float32), fine.faces.astype(np.int32), lambda points: points)
    mesh = make_mesh(surface, MeshOptions(texture_size=0))
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


class SolidMesh(MeshParticle):
    """The same body as a mesh particle, begun from the field as runs begin them, with the field's colours in closed form."""

    def color_at(self, points):
        return Solid("torus").color_at(points)


@functools.cache
def body(name):
    """Return a body, its surface, and its own pictures."""
    theta = Solid(name.removesuffix(" as a mesh particle"))
    if name != theta.name:
        theta = SolidMesh.from_particle(MeshSettings(MeshConfig(resolution=48), theta.config), theta, torch.Generator().manual_seed(0))
    return find_surface(theta, 96), own_pictures(theta)


def own_pictures(theta):
    return torch.nn.functional.avg_pool2d(pictures_on_white(theta, CAMERAS, 2 * SIZE)[0], 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["torus", "box", "torus as a mesh particle"])
def test_a_browser_shows_the_glb_as_the_particle_is_rendered(viewer, node, tmp_path, name, kind):
    surface, own = body(name)
    write_glb(make_mesh(surface, MeshOptions(texture_size=KINDS[kind])), tmp_path / "mesh.glb")
    assert validate(tmp_path / "mesh.glb", node)[0] == []
    psnr = psnr_db(viewer.pictures(tmp_path / "mesh.glb", CAMERAS, SIZE), own)
    print(f"{name}, {kind}: PSNR {psnr:.1f} dB")
    assert psnr >= 28.0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A mesh that was a field of the embedded prior, and its own pictures."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = ["--preset", "object", *TINY[2:], "--num-particles", "1", "--mesh.resolution", "24", "--wandb.mode", "disabled"]
    stages = ["--stage", "coarse.num_updates=4", "geometry.num_updates=2", "texture.num_updates=2"]
    assert main(["train", "a green duck", *words, *stages, "--run-dir", str(folder)]) == 0
    return folder, own_pictures(open_run(folder).particles[0])


@pytest.mark.parametrize("texture_size", ["512", "0"])
def test_a_browser_shows_what_the_command_exports_of_a_trained_mesh_as_it_is_rendered(viewer, node, trained, tmp_path, texture_size):
    folder, own = trained
    assert main(["export", str(folder), "--format", "glb", "--texture-size", texture_size, "--out", str(tmp_path)]) == 0
    assert validate(tmp_path / "mesh_0000.glb", node)[0] == []
    psnr = psnr_db(viewer.pictures(tmp_path / "mesh_0000.glb", CAMERAS, SIZE), own)
    print(f"trained mesh, texture {texture_size}: PSNR {psnr:.1f} dB")
    assert psnr >= 28.0
