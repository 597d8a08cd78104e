"""cameras.py: poses, rays and view words against geometry done by hand. fp64, so that tolerances are rounding alone."""

import math

import pytest
import torch

from dist_vsd.cameras import Cameras, cast_rays, look_at_origin, turntable, uniform
from dist_vsd.view_words import view_words

ROUNDING = {"rtol": 0, "atol": 1e-12}  # fp64 keeps 16 digits; sines, cosines and a few products lose some of them


def camera(azimuth_deg, elevation_deg=0.0, distance=2.0, fov_deg=90.0):
    return look_at_origin(*(torch.tensor([float(v)], dtype=torch.float64) for v in (azimuth_deg, elevation_deg, distance, fov_deg)))


def vector(*components):
    return torch.tensor(components, dtype=torch.float64)


@pytest.mark.parametrize(
    ("azimuth_deg", "elevation_deg", "position"),
    [(0, 0, (2, 0, 0)), (90, 0, (0, 2, 0)), (180, 0, (-2, 0, 0)), (-90, 0, (0, -2, 0)), (0, 90, (0, 0, 2)), (0, 30, (3**0.5, 0, 1))],
)
def test_azimuth_zero_stands_in_front_at_plus_x_and_elevation_rises_to_plus_z(azimuth_deg, elevation_deg, position):
    c2w = camera(azimuth_deg, elevation_deg).c2w[0]
    torch.testing.assert_close(c2w[:3, 3], vector(*position), **ROUNDING)
    assert torch.equal(c2w[3], vector(0, 0, 0, 1))


def test_the_front_camera_looks_along_minus_x_with_z_up_and_plus_y_on_the_right():
    right, up, backward = camera(0).c2w[0, :3, :3].T
    torch.testing.assert_close(right, vector(0, 1, 0), **ROUNDING)
    torch.testing.assert_close(up, vector(0, 0, 1), **ROUNDING)
    torch.testing.assert_close(backward, vector(1, 0, 0), **ROUNDING)


@pytest.mark.parametrize("elevation_deg", [-90.0, -30.0, 0.0, 45.0, 89.999, 90.0])
def test_rotations_are_proper_everywhere_the_poles_included(elevation_deg):
    azimuth = torch.arange(-180.0, 180.0, 15.0, dtype=torch.float64)
    ones = torch.ones_like(azimuth)
    rotation = look_at_origin(azimuth, elevation_deg * ones, 3 * ones, 40 * ones).c2w[:, :3, :3]
    identity = torch.eye(3, dtype=torch.float64).expand_as(rotation)
    torch.testing.assert_close(rotation.transpose(1, 2) @ rotation, identity, **ROUNDING)
    torch.testing.assert_close(torch.linalg.det(rotation), ones, **ROUNDING)


@pytest.mark.parametrize(("azimuth_deg", "elevation_deg"), [(0, 0), (37, -20), (-140, 63), (10, 90)])
def test_the_centre_ray_hits_the_origin_and_rays_are_unit_vectors(azimuth_deg, elevation_deg):
    origins, directions = cast_rays(camera(azimuth_deg, elevation_deg, distance=2.7, fov_deg=40), 5, 7)
    assert origins.shape == directions.shape == (1, 35, 3)
    torch.testing.assert_close((origins + 2.7 * directions)[0, 2 * 7 + 3], vector(0, 0, 0), **ROUNDING)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(1, 35, dtype=torch.float64), **ROUNDING)


def test_up_in_the_image_is_z_up():
    directions = cast_rays(camera(25, 40, fov_deg=50), 6, 6)[1].reshape(6, 6, 3)
    assert bool((directions[:-1, :, 2] > directions[1:, :, 2]).all())


def test_a_point_lands_in_the_pixel_that_projection_by_hand_says():
    # From (2, 0, 0) with a field of view of 90 degrees the plane x = 0 spans y and z in [-2, 2], half a unit a pixel of 8:
    # y = 0.75 is the middle of column 4 + 1, z = 0.25 the middle of the row just above the horizon.
    origins, directions = cast_rays(camera(0), 8, 8)
    point = vector(0, 0.75, 0.25)
    toward = point - origins[0, 0]
    pixel = int((directions[0] @ (toward / toward.norm())).argmax())
    assert divmod(pixel, 8) == (3, 5)
    torch.testing.assert_close(directions[0, pixel], toward / toward.norm(), **ROUNDING)


def test_the_field_of_view_is_vertical_and_pixels_are_square():
    directions = cast_rays(camera(0, fov_deg=60), 4, 8, jitter=torch.zeros(1, 4, 8, 2))[1].reshape(4, 8, 3)
    top, left = directions[0, 4], directions[2, 0]  # jitter 0 is a pixel's upper left corner
    assert math.degrees(math.atan2(float(top[2]), -float(top[0]))) == pytest.approx(30, abs=1e-10)
    assert float(left[1] / left[0]) == pytest.approx(2 * math.tan(math.radians(30)), abs=1e-12)


def test_jitter_of_a_half_is_the_pixel_centre_to_the_bit():
    cameras = camera(12, 34)
    jittered = cast_rays(cameras, 4, 4, jitter=torch.full((1, 4, 4, 2), 0.5))[1]
    assert torch.equal(jittered, cast_rays(cameras, 4, 4)[1])


@pytest.mark.parametrize(
    ("azimuth_deg", "elevation_deg", "words"),
    [
        (0, 0, "front view"), (44.9, 0, "front view"), (-44.9, -80, "front view"), (315.1, 0, "front view"), (720, 0, "front view"),
        (45, 0, "side view"), (-45, 0, "side view"), (90, 0, "side view"), (135, 0, "side view"), (-135, 0, "side view"),
        (135.1, 0, "back view"), (180, 0, "back view"), (-180, 0, "back view"), (540, 0, "back view"),
        (0, 60, "front view"), (0, 60.1, "overhead view"), (180, 90, "overhead view"),
    ],
)  # fmt: skip
def test_view_words_change_at_45_and_135_degrees_and_above_60(azimuth_deg, elevation_deg, words):
    assert view_words(azimuth_deg, elevation_deg) == words


def test_view_words_follow_other_borders_too():
    assert view_words(40, 0, front_deg=30) == "side view"
    assert view_words(149, 0, front_deg=30) == "side view"
    assert view_words(0, 35, overhead_deg=30) == "overhead view"


def test_a_turntable_begins_in_front_and_turns_in_equal_steps_at_one_height():
    cameras = turntable(8, elevation_deg=30, distance=2, fov_deg=40)
    assert cameras.azimuth_deg.tolist() == [0, 45, 90, 135, -180, -135, -90, -45]
    position = cameras.c2w[:, :3, 3]
    torch.testing.assert_close(position[:, 2], torch.ones(8), rtol=0, atol=1e-6)  # 2 sin 30 degrees, in fp32
    step = (position * position.roll(-1, 0)).sum(-1)
    # Neighbours are 45 degrees apart on a circle of radius sqrt(3) at height 1.
    torch.testing.assert_close(step, torch.full((8,), 3 * math.cos(math.radians(45)) + 1), rtol=0, atol=1e-5)


def test_a_turntable_without_views_is_refused():
    with pytest.raises(ValueError, match="at least 1 view, got 0"):
        turntable(0, 0.0, 2.0, 40.0)


def test_slices_joined_again_are_the_same_cameras():
    cameras = turntable(5, 10, 3, 40)
    again = Cameras.cat([cameras[:2], cameras[2:]])
    assert len(again) == 5
    for name in ("c2w", "fov", "azimuth_deg", "elevation_deg"):
        assert torch.equal(getattr(again, name), getattr(cameras, name))


def test_uniform_draws_stay_in_their_range_and_fill_it():
    drawn = uniform(-10.0, 45.0, 10_000, torch.Generator().manual_seed(0))
    assert -10 <= float(drawn.min()) < -9.9
    assert 44.9 < float(drawn.max()) < 45
    # The mean of 10,000 has a standard deviation of 55 / sqrt(12) / 100 = 0.16; four of them.
    assert float(drawn.mean()) == pytest.approx(17.5, abs=0.64)
