"""Normals, depth and opacity of radiance fields against closed forms, the prior's convention, and finite differences."""

import math

import pytest
import torch

from dist_vsd.cameras import Cameras, cast_rays, look_at_origin, turntable
from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.normal_maps import color_normals
from dist_vsd.particles.channels import picture_of
from dist_vsd.particles.particle_configs import DenseGridConfig, RadianceFieldConfig
from dist_vsd.particles.radiance_field import RadianceField
from dist_vsd.particles.representations import CHANNELS, REPRESENTATIONS
from dist_vsd.particles.volume_rendering import outward_normals
from dist_vsd.priors.embedded.render import render_channels
from dist_vsd.priors.embedded.scenes import NUM_PROPORTIONS
from dist_vsd.training.state import build_state
from dist_vsd.training.update import update
from tests.runs import gradients_taken
from tests.test_radiance_field import empty, make, without_mlp
from tests.test_volume_rendering import fog, render, vectors

RADIUS = 0.6


def hard_ball(**options):
    """A ball whose density goes from nothing to 100 within 0.03 inside its edge."""
    settings = {"density_strength": 2000.0, "density_radius": RADIUS, "num_samples": 128} | options
    return without_mlp(make(**settings))


def a_camera(distance=3.0):
    return look_at_origin(*(torch.tensor([value]) for value in (70.0, 25.0, distance, 40.0)))


def distances_to_a_ball(cameras, size, radius):
    """Where rays meet a ball around the origin first, (B, 1, H, W); nan where they pass it."""
    origins, directions = cast_rays(cameras, size, size)
    b = (origins * directions).sum(-1)
    root = b.square() - origins.square().sum(-1) + radius**2
    return (-b - root.sqrt()).view(len(cameras), 1, size, size)


def test_normals_are_red_to_the_right_green_upwards_and_blue_towards_the_camera():
    camera = a_camera()
    towards = camera.c2w[0, :3, 3] / camera.c2w[0, :3, 3].norm()  # it looks at the origin
    right = torch.nn.functional.normalize(torch.linalg.cross(torch.tensor([0.0, 0, 1]), towards), dim=0)
    normals = torch.stack([right, torch.linalg.cross(towards, right), towards])
    expected = torch.tensor([[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]])
    torch.testing.assert_close(color_normals(normals, camera.c2w), expected, rtol=0, atol=1e-6)
    over_white = color_normals(0.25 * normals, camera.c2w, torch.full((3, 1), 0.25))
    torch.testing.assert_close(over_white, 0.25 * expected + 0.75, rtol=0, atol=1e-6)


@pytest.mark.parametrize("density", [0.3, 2.0, 20.0])
def test_the_distance_in_fog_is_the_mean_of_an_exponential_that_is_cut_off(density):
    """Of what is hit within a length L: 1 / sigma - L exp(-sigma L) / (1 - exp(-sigma L)) behind the fog's edge."""
    rays = render(fog(density), vectors((-3, 0.1, 0)), vectors((1, 0, 0)), num_samples=4000)
    inside = 1 / density - 2 * math.exp(-2 * density) / -math.expm1(-2 * density)
    assert rays.distance.item() == pytest.approx(2 + inside, abs=1e-5)  # intervals of 5e-4, sampled in the middle


def test_rays_that_hit_nothing_have_no_distance():
    assert torch.equal(render(fog(5.0), vectors((-3, 1.5, 0)), vectors((1, 0, 0))).distance, vectors(0.0)[0:1])
    shown = empty(make()).render(turntable(2, 15.0, 3.0, 40.0), 6)
    # At a density of exp(-120) opacity is below the least that divides.
    torch.testing.assert_close(shown.depth, torch.zeros(2, 1, 6, 6), rtol=0, atol=1e-9)


@pytest.mark.parametrize("distance", [2.0, 3.5])
def test_the_depth_of_a_ball_is_the_distance_at_which_rays_meet_it(distance):
    cameras = Cameras.cat([a_camera(distance), look_at_origin(*(torch.tensor([value]) for value in (-100.0, -40.0, distance, 40.0)))])
    depth, expected = hard_ball().render(cameras, 24).depth, distances_to_a_ball(cameras, 24, RADIUS)
    assert depth.shape == (2, 1, 24, 24)
    inner = distances_to_a_ball(cameras, 24, RADIUS - 0.05).isfinite()  # at the rim a ray goes through what is soft
    assert inner.float().mean() > 0.1
    torch.testing.assert_close(depth[inner], expected[inner], rtol=0, atol=2.5 / 128 + 0.02)  # an interval, and the soft edge


def test_central_differences_of_a_quadratic_density_are_its_gradient():
    points = 0.8 * (torch.rand(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1)
    normals = outward_normals(lambda at: 50 - 30 * at.square().sum(-1) + 4 * at[:, 0], points, 0.05, 1.0)
    gradient = 60 * points - torch.tensor([4.0, 0, 0]).double()
    torch.testing.assert_close(normals, gradient / (gradient.square().sum(-1, keepdim=True) + 1e-4).sqrt(), rtol=0, atol=1e-12)


def test_the_cube_s_border_is_never_crossed_for_a_normal():
    asked = []
    outward_normals(lambda at: asked.append(at) or at.sum(-1), torch.tensor([[1.0, -1.0, 0.99]]), 0.1, 1.0)
    assert torch.cat(asked).abs().max() == 1.0


@pytest.mark.parametrize("options", [{}, {"encoding": "hash"}, {"hidden_below": 1e-4}, {"tile_points": 5000}], ids=str)
def test_the_normal_map_of_a_ball_points_outwards(options):
    theta, camera = hard_ball(**options), a_camera()
    shown = theta.render(camera, 24)
    origins, directions = cast_rays(camera, 24, 24)
    hit = origins + distances_to_a_ball(camera, 24, RADIUS).view(1, -1, 1) * directions
    expected = color_normals(hit / RADIUS, camera.c2w[:, None]).view(1, 24, 24, 3).permute(0, 3, 1, 2)
    inner = distances_to_a_ball(camera, 24, RADIUS - 0.05).isfinite().expand(-1, 3, -1, -1)
    torch.testing.assert_close(shown.channel("normal")[inner], expected[inner], rtol=0, atol=0.05)  # the soft edge, seen at a slant


def test_a_ball_has_the_normal_map_that_the_embedded_prior_has_learned():
    """The same colours as priors/embedded/render.py gives to its ball, of radius 0.68."""
    camera = a_camera()
    _, learned = render_channels("ball", ["red"], torch.zeros(1, NUM_PROPORTIONS), camera, 33)
    shown = hard_ball(density_radius=0.68).render(camera, 33)
    inner = distances_to_a_ball(camera, 33, 0.62).isfinite().expand(-1, 3, -1, -1)
    assert inner.float().mean() > 0.2
    torch.testing.assert_close(shown.channel("normal")[inner], learned[inner], rtol=0, atol=0.05)  # the soft edge, seen at a slant
    torch.testing.assert_close(shown.channel("normal")[0, :, 0, 0], torch.ones(3), rtol=0, atol=1e-4)


def test_a_render_asks_for_no_normals_until_somebody_does(monkeypatch):
    theta, asked = make(), []
    density = theta.density
    monkeypatch.setattr(theta, "density", lambda points: asked.append(len(points)) or density(points))
    shown = theta.render(turntable(1, 15.0, 3.0, 40.0), 8)
    shown.image.sum().backward()
    assert asked == []
    shown.channel("normal")
    assert len(asked) == 6


def test_the_gradient_of_a_normal_map_equals_finite_differences():
    config = RadianceFieldConfig(dense_grid=DenseGridConfig(resolutions=(4,)), num_samples=6, hidden_width=8)
    theta = RadianceField(config, torch.Generator().manual_seed(0)).double()
    camera = Cameras(*(tensor.double() for tensor in a_camera().tensors()))
    wanted = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss():
        return (theta.render(camera, 4).channel("normal") * wanted).sum()

    loss().backward()
    for parameter in (theta.encoding.levels[0], theta.output.weight):
        place = parameter.grad.abs().flatten().argmax()
        values = []
        for shift in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.view(-1)[place] += shift
                values.append(loss().item())
                parameter.view(-1)[place] -= shift
        assert parameter.grad.view(-1)[place].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)  # fp64


def test_an_update_on_normals_moves_the_density_and_leaves_the_colours_alone():
    small = {"prompt": "a red car", "num_particles": 1, "objective": "sds", "supervise": "normal", "render_size": 16}
    field = {"dense_grid": {"resolutions": [8]}, "num_samples": 16}
    state = build_state(merge(load_preset("embedded"), small | {"field": field}, "test"), Layout.of(1), torch.device("cpu"))
    taken = gradients_taken(state.particles[0])
    update(state, 0)
    gradient = taken["output.weight"]
    assert float(gradient[0].abs().max()) > 0
    assert not gradient[1:].any()


def test_an_objective_that_sees_colours_alone_refuses_normals():
    with pytest.raises(ValueError, match="objective clip sees colours alone, got supervise 'normal'"):
        merge(load_preset("embedded"), {"prompt": "a car", "supervise": "normal", "objective": "clip"}, "test")


def test_every_channel_is_a_picture_of_its_own():
    camera = a_camera()
    with torch.no_grad():
        shown = hard_ball().render(camera, 15)
        pictures = {channel: picture_of(shown, channel, camera) for channel in CHANNELS}
    assert {tuple(picture.shape) for picture in pictures.values()} == {(1, 3, 15, 15)}
    assert [round(float(pictures[name][0, 0, 0, 0]), 3) for name in CHANNELS] == [1, 1, 1, 0]  # what is hit by nothing
    # The ball's nearest point is RADIUS before the origin: at (1 - RADIUS) / 2 of the way from black to white.
    assert float(pictures["depth"][0, 0, 7, 7]) == pytest.approx((1 - RADIUS) / 2, abs=0.02)
    assert float(pictures["opacity"][0, 0, 7, 7]) == pytest.approx(1, abs=1e-3)


def test_representations_name_channels_that_exist_in_their_order():
    for row in REPRESENTATIONS.values():
        assert list(row.shows) == [channel for channel in CHANNELS if channel in row.shows]
    assert REPRESENTATIONS["radiance_field"].channels == ["color", "normal"]
