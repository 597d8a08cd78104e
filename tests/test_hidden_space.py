"""What no camera sees of a field, by shapes whose inside is known; and the solids that begin from it."""

import dataclasses
import math

import pytest
import torch

from dist_vsd.cameras import cast_rays
from dist_vsd.particles.hidden_space import LEAST_LIGHT, VIEW_PIXELS, hidden_space, reach_of_rays, seen_from
from dist_vsd.particles.iso_level import density_volume, views_of_cube
from dist_vsd.particles.mesh import MeshParticle
from dist_vsd.particles.mesh_start import lattice_points
from dist_vsd.particles.particle_configs import DenseGridConfig, MeshConfig, MeshSettings, RadianceFieldConfig
from dist_vsd.particles.radiance_field import RadianceField

RESOLUTION, WALL, HALF = 32, 0.125, 0.5  # the shapes are boxes of an edge of 1, with walls two cells thick
FIELD = RadianceFieldConfig(dense_grid=DenseGridConfig(resolutions=(8,)), hidden_width=8)
OPAQUE = 60.0


class Box(RadianceField):
    """A hollow box with walls of a given density, without one of its sides if it is named by axis and sign."""

    def __init__(self, density, absent=None):
        super().__init__(FIELD, torch.Generator().manual_seed(0))
        self.of_walls, self.absent = density, absent

    def forward(self, points):
        inner = points.abs() < HALF - WALL
        if self.absent:
            axis, sign = self.absent
            inner[:, axis] |= (points[:, axis] * sign > 0) & (points[:, axis].abs() < HALF)
        is_wall = (points.abs() < HALF).all(-1) & ~inner.all(-1)
        return self.of_walls * is_wall.float(), self.color_at(points)


def hidden_of(field, points):
    return hidden_space(field, density_volume(field, RESOLUTION), torch.tensor(points))


INSIDE, ABOVE = [[0.0, 0.0, 0.0], [0.2, -0.2, 0.2]], [[0.0, 0.0, 0.8], [0.8, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("density", "absent", "is_hidden"),
    [
        (OPAQUE, None, True),
        (OPAQUE, (2, -1), True),  # no camera looks from below
        (OPAQUE, (2, 1), False),  # a cup
        (OPAQUE, (0, 1), False),  # an open door
        (-math.log(0.6) / WALL, (2, -1), True),  # walls of fog, through each of which comes more than half of the light
        (-math.log(0.97) / WALL, None, False),  # mist
    ],
    ids=["closed", "without a floor", "without a lid", "without a side", "of fog", "of mist"],
)
def test_the_inside_of_a_box_is_hidden_where_no_camera_looks_in(density, absent, is_hidden):
    field = Box(density, absent)
    assert hidden_of(field, INSIDE).tolist() == [is_hidden] * 2
    assert hidden_of(field, ABOVE).tolist() == [False] * 2


def test_a_ray_reaches_the_first_wall_and_where_there_is_none_as_far_as_one_likes():
    field = Box(OPAQUE)
    camera = views_of_cube(field, [(0.0, 1)])
    reach = reach_of_rays(field, density_volume(field, RESOLUTION), camera).view(VIEW_PIXELS, VIEW_PIXELS)
    middle, distance = VIEW_PIXELS // 2, float(camera.c2w[0, :3, 3].norm())
    into_the_wall = -math.log(LEAST_LIGHT) / OPAQUE
    assert float(reach[middle, middle]) == pytest.approx(distance - HALF + into_the_wall, abs=2 / RESOLUTION)
    assert float(reach[0, 0]) == math.inf


def test_a_point_on_a_ray_is_seen_by_the_rays_pixel_at_its_distance():
    cameras = views_of_cube(Box(OPAQUE), [(-10.0, 3), (90.0, 1)])
    for view in range(len(cameras)):
        camera = cameras[view : view + 1]
        origins, directions = (rays[0] for rays in cast_rays(camera, VIEW_PIXELS, VIEW_PIXELS))
        t = torch.linspace(1.0, 5.0, len(origins))
        pixel, distance = seen_from(camera, origins + t[:, None] * directions)
        assert torch.equal(pixel, torch.arange(len(origins)))
        torch.testing.assert_close(distance, t)


def volume_of(mesh):
    return float((mesh.density(lattice_points(64, 1.0)) > 0).float().mean()) * 8


def mesh_from(field):
    settings = MeshSettings(MeshConfig(resolution=RESOLUTION), dataclasses.replace(FIELD))
    return MeshParticle.from_particle(settings, field, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("density", [OPAQUE, -math.log(0.6) / WALL], ids=["opaque", "fog"])
def test_a_house_without_a_floor_becomes_a_solid_and_a_cup_stays_hollow(density):
    full, house, cup = (volume_of(mesh_from(Box(density, absent))) for absent in (None, (2, -1), (2, 1)))
    assert 0.9 * full < house <= full
    assert cup < 0.65 * full


def test_a_surface_stays_where_the_density_is_though_some_light_is_lost_before_it(monkeypatch):
    field = Box(OPAQUE)
    with_hidden = mesh_from(field)
    monkeypatch.setattr("dist_vsd.particles.mesh.hidden_space", lambda _field, _volume, points: points[:, 0] > 9)
    assert torch.equal(with_hidden.surface()[0], mesh_from(field).surface()[0])
