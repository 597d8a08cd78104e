"""A surface made light, unwrapped and textured: a torus whose colours are known at each point."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import trimesh

from dist_vsd.cameras import cast_rays
from dist_vsd.config import CameraConfig
from dist_vsd.export.mesh import MeshOptions, make_mesh
from dist_vsd.export.mesh_files import write_obj
from dist_vsd.export.mesh_report import describe, psnr_db, what_was_lost
from dist_vsd.export.rasterize import fragments
from dist_vsd.export.simplify import as_trimesh, drop_fragments, simplify
from dist_vsd.export.surface import Surface, find_surface
from dist_vsd.export.texture import bake, require_xatlas, unwrap
from dist_vsd.particles.particle import Particle, Render

SIZE = 512
pytest.importorskip("xatlas", reason="no wheel of xatlas for this Python")


def color_of(points):
    """Return smooth colours, which a bilinear texture has nearly exactly."""
    return 0.5 + 0.4 * torch.sin(3 * points)


def surface_of(mesh):
    return Surface(mesh.vertices.astype(np.float32), mesh.faces.astype(np.int32), color_of)


@pytest.fixture(scope="module")
def torus():
    return surface_of(trimesh.creation.torus(0.5, 0.2, major_sections=80, minor_sections=40))


@pytest.fixture(scope="module")
def texture(torus):
    return bake(torus, unwrap(torus), SIZE)


def anywhere(torus, count=20_000):
    """Draw points on faces: indices, weights, places."""
    generator = np.random.default_rng(0)
    face, weights = generator.integers(0, len(torus.faces), count), generator.dirichlet([1, 1, 1], count)
    return face, weights, (torus.vertices[torus.faces[face]] * weights[..., None]).sum(1)


def test_charts_cover_no_texel_twice_and_keep_every_face(torus, texture):
    atlas = texture.atlas
    assert np.array_equal(atlas.vertex[atlas.faces], torus.faces)
    assert (atlas.uv.min() >= 0, atlas.uv.max() <= 1) == (True, True)
    faces, texels = (np.concatenate(column) for column in list(zip(*fragments(atlas.uv[atlas.faces] * SIZE, SIZE, SIZE), strict=True))[:2])
    assert len(np.unique(texels)) > 0.999 * len(texels)  # centres on an edge belong to both of its faces
    assert len(np.unique(faces)) > 0.95 * len(torus.faces)


def test_every_point_of_the_surface_finds_its_colour_in_the_texture(torus, texture):
    face, weights, points = anywhere(torus)
    errors = np.abs(texture.colors()(face, weights) - color_of(torch.from_numpy(points)).numpy())
    # A byte's rounding, and at a chart's edge half a texel of 1 / 130 units at a slope of 1.2.
    assert errors.max() < 1 / 255 + 1.2 * 2 / texture.texels_per_unit
    assert errors.mean() < 1 / 255


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_texture_at_a_half_to_an_eighth_of_its_size_shows_no_seams(torus, texture, level):
    side = SIZE >> level
    smaller = texture.picture.reshape(side, 1 << level, side, 1 << level, 3).mean((1, 3))
    face, weights, points = anywhere(torus)
    found = dataclasses.replace(texture, picture=smaller.astype(np.uint8)).colors()(face, weights)
    errors = np.abs(found - color_of(torch.from_numpy(points)).numpy())
    texel = (1 << level) / texture.texels_per_unit
    # Of the nearest texels, all lie within two of the point, but for what the chart beside has brought beyond the padding.
    assert np.quantile(errors, 0.99) < 1.5 / 255 + 1.2 * 2 * texel


def test_texel_density_and_coverage_are_those_of_the_areas(torus, texture):
    corners = texture.atlas.uv[texture.atlas.faces].astype(float)
    edges = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    flat = np.abs(edges[0][:, 0] * edges[1][:, 1] - edges[0][:, 1] * edges[1][:, 0]).sum() / 2
    area = as_trimesh(torus).area
    assert texture.coverage == pytest.approx(flat, rel=0.01)
    assert texture.texels_per_unit == pytest.approx(SIZE * math.sqrt(flat / area), rel=0.01)


def test_fewer_faces_leave_a_torus_watertight_and_near_its_volume():
    torus = surface_of(trimesh.creation.torus(0.5, 0.2, major_sections=160, minor_sections=80))
    fewer = simplify(torus, 3000)
    assert len(torus.faces) == 25600
    assert len(fewer.faces) <= 3000
    assert as_trimesh(fewer).is_watertight
    assert as_trimesh(fewer).volume == pytest.approx(2 * math.pi**2 * 0.5 * 0.2**2, rel=0.02)
    assert simplify(torus, 30000) is torus


def test_fragments_and_the_walls_of_hollows_are_left_out_and_counted():
    body, crumb, hollow = trimesh.creation.icosphere(3, 0.5), trimesh.creation.icosphere(1, 0.02), trimesh.creation.icosphere(3, 0.4)
    part = trimesh.creation.icosphere(3, 0.2)
    crumb.apply_translation([0.9, 0, 0])
    part.apply_translation([0, 0.9, 0])
    hollow.invert()
    surface = surface_of(trimesh.util.concatenate([hollow, crumb, body, part]))
    rest, dropped = drop_fragments(surface)
    assert dropped == 2
    assert len(rest.faces) == len(body.faces) + len(part.faces)
    assert as_trimesh(rest).volume == pytest.approx(body.volume + part.volume, rel=1e-5)
    kept = make_mesh(surface, MeshOptions(texture_size=0, keep_fragments=True))
    assert (kept.num_fragments, len(kept.faces)) == (0, len(surface.faces))


def test_the_walls_of_what_is_open_are_kept():
    cup, other = trimesh.creation.icosphere(3, 0.5), trimesh.creation.icosphere(3, 0.4)
    cup.update_faces(cup.triangles_center[:, 2] < 0.2)
    other.invert()
    surface = surface_of(trimesh.util.concatenate([cup, other]))
    assert drop_fragments(surface)[1] == 0


def test_a_limit_of_faces_holds_with_a_texture_by_itself_and_without_one_only_if_it_is_given():
    assert MeshOptions().most_faces == 50_000
    assert MeshOptions(texture_size=0).most_faces == 0
    assert MeshOptions(texture_size=0, max_faces=7).most_faces == 7


def test_an_obj_without_a_texture_has_its_colours_at_the_vertices(torus, tmp_path):
    mesh = make_mesh(torus, MeshOptions(texture_size=0))
    assert write_obj(mesh, tmp_path / "torus.obj") == [tmp_path / "torus.obj"]
    read = trimesh.load(tmp_path / "torus.obj", process=False)
    assert np.allclose(np.asarray(read.visual.vertex_colors)[:, :3] / 255, mesh.vertex_colors, atol=0.003)


class OwnSurface(Particle):
    """A particle that is a mesh by itself, rendered by asking where each ray meets a ball: what export is to need of such a one."""

    RADIUS = 0.5

    def __init__(self):
        super().__init__()
        self.places = torch.nn.Parameter(torch.tensor(trimesh.creation.icosphere(5, self.RADIUS).vertices, dtype=torch.float32))
        self.triangles = torch.tensor(trimesh.creation.icosphere(5, self.RADIUS).faces)

    def surface(self):
        return self.places, self.triangles

    def color_at(self, points):
        return color_of(points)

    def render(self, cameras, size, drawn=None):
        origins, directions = (rays.reshape(-1, 3) for rays in cast_rays(cameras, size, size))
        along = -(origins * directions).sum(1)
        inside = self.RADIUS**2 - (origins + along[:, None] * directions).square().sum(1)
        points = origins + (along - inside.clamp_min(0).sqrt())[:, None] * directions
        opacity = (inside > 0).float().reshape(len(cameras), 1, size, size)
        color = color_of(points).reshape(len(cameras), size, size, 3).permute(0, 3, 1, 2) * opacity
        return Render(color + 1 - opacity, opacity, color, {})


@pytest.mark.parametrize("texture_size", [0, 512])
def test_a_particle_that_is_a_surface_is_exported_as_it_is_and_little_is_lost(texture_size):
    theta = OwnSurface()
    mesh = make_mesh(find_surface(theta, 0), MeshOptions(texture_size=texture_size))
    report = describe(mesh)
    assert (report["num_faces"], report["is_watertight"], report["num_fragments_dropped"]) == (len(theta.triangles), True, 0)
    assert np.allclose(report["bounds"], [[-0.5] * 3, [0.5] * 3], atol=1e-3)
    lost = what_was_lost(mesh, theta, CameraConfig(), 64, None, "a ball")
    assert lost["psnr_db"] > 35
    assert lost["silhouette_iou"] > 0.99
    assert "clip_mesh" not in lost


def test_a_wrong_colour_and_a_wrong_shape_are_lost_more():
    theta, distance = OwnSurface(), sum(CameraConfig().distance) / 2
    surface = find_surface(theta, 0)
    right, grey, larger = (
        what_was_lost(make_mesh(each, MeshOptions(texture_size=0)), theta, CameraConfig(), 64, None, "")
        for each in (
            surface,
            dataclasses.replace(surface, color=lambda points: 0 * points + 0.5),
            dataclasses.replace(surface, vertices=surface.vertices * np.float32(1.2)),
        )
    )
    assert right["psnr_db"] > grey["psnr_db"] + 10
    assert grey["silhouette_iou"] == right["silhouette_iou"]
    areas = [math.tan(math.asin(r / distance)) ** 2 for r in (0.5, 0.6)]  # of the discs as which balls are seen
    assert larger["silhouette_iou"] == pytest.approx(areas[0] / areas[1], abs=0.02)
    assert psnr_db(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.1)) == pytest.approx(20.0, abs=1e-4)


def test_a_missing_xatlas_is_told_with_what_to_do(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install xatlas, or give --texture-size 0"):
        require_xatlas()
