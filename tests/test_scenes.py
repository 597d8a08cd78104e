"""priors/embedded/scenes.py and render.py: the symmetry, size and distances of the procedural objects, and their pictures."""

import itertools

import pytest
import torch

from dist_vsd.cameras import cast_rays, look_at_origin
from dist_vsd.priors.embedded.render import render_object
from dist_vsd.priors.embedded.scenes import ACCENTS, COLORS, NUM_PROPORTIONS, OBJECTS, SCENE_RADIUS, albedo, signed_distance

EVERY_OBJECT = pytest.mark.parametrize("name", list(OBJECTS))
WITH_ELLIPSOIDS = {"duck", "snowman", "mushroom"}
# A handle, a beak, a nose, a bonnet, a backrest, a door: these look different from behind.
WITH_A_FRONT = {"mug", "duck", "snowman", "car", "chair", "house"}
CANONICAL = torch.zeros(1, NUM_PROPORTIONS)


def points_in_ball(count, radius=1.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator, dtype=dtype), dim=-1)
    return radius * torch.rand(count, 1, generator=generator, dtype=dtype) ** (1 / 3) * direction


def some_proportions(count, seed=0, dtype=torch.float32):
    return torch.rand(count, NUM_PROPORTIONS, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def view(azimuth_deg=0.0, elevation_deg=0.0, distance=2.9, fov_deg=41.0):
    return look_at_origin(*(torch.tensor([v]) for v in (azimuth_deg, elevation_deg, distance, fov_deg)))


def surface_points(name, proportions, count):
    """Return points of the surface: where segments from within an object to its outside change sign."""
    points = points_in_ball(40 * count, 1.2, dtype=torch.float64)
    distance = signed_distance(name, points, proportions)
    inside, outside = points[distance < 0][:count], points[distance > 0][:count]
    inside, outside = inside[: len(outside)], outside[: len(inside)]
    for _ in range(40):
        middle = (inside + outside) / 2
        within = (signed_distance(name, middle, proportions) < 0)[:, None]
        inside, outside = torch.where(within, middle, inside), torch.where(within, outside, middle)
    return inside


@EVERY_OBJECT
def test_objects_are_their_own_mirror_images_in_y(name):
    points, proportions = points_in_ball(4000), some_proportions(4000)
    mirrored = points * torch.tensor([1.0, -1.0, 1.0])
    # A change of sign rounds nothing.
    assert torch.equal(signed_distance(name, mirrored, proportions), signed_distance(name, points, proportions))
    assert torch.equal(albedo(name, "red", mirrored, proportions), albedo(name, "red", points, proportions))


@EVERY_OBJECT
def test_the_most_extreme_proportions_stay_inside_the_scene_radius(name):
    # What reached beyond the sphere would be cut off flat by the renderer, which begins and ends its march there.
    extremes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=NUM_PROPORTIONS)))
    sphere = SCENE_RADIUS * torch.nn.functional.normalize(points_in_ball(3000), dim=-1)
    distance = torch.stack([signed_distance(name, sphere, proportions[None]) for proportions in extremes])
    worst = extremes[distance.amin(1).argmin()].tolist()
    assert float(distance.min()) > 0, f"{name} reaches out of the scene by {-float(distance.min()):.3f} or more with {worst}"


@EVERY_OBJECT
def test_outside_the_signed_distance_is_never_larger_than_the_true_one(name):
    """What sphere tracing rests on: a step of that length never jumps over a surface."""
    for seed in range(2):
        proportions = some_proportions(1, seed, torch.float64)
        surface = surface_points(name, proportions, 2000)
        points = points_in_ball(1500, 1.2, seed, torch.float64)
        distance = signed_distance(name, points, proportions)
        # The nearest of some sampled points of the surface is no nearer than the surface itself; bisection is right to 1e-12.
        true_or_more = torch.cdist(points, surface).amin(1)
        assert float((distance - true_or_more)[distance > 0].max()) < 1e-9


@pytest.mark.parametrize("name", [name for name in OBJECTS if name not in WITH_ELLIPSOIDS])
def test_outside_the_distance_of_exact_parts_changes_no_faster_than_the_point_moves(name):
    # The usual formula of an ellipsoid falls short beside its long axis and climbs back with slopes of 3: never too long, not Lipschitz.
    for seed in range(3):
        proportions = some_proportions(1, seed, torch.float64)
        a = points_in_ball(6000, 1.2, seed, torch.float64)
        b = a + 1e-3 * points_in_ball(6000, 1.0, seed + 50, torch.float64)
        distance_a, distance_b = (signed_distance(name, p, proportions) for p in (a, b))
        slope = ((distance_a - distance_b).abs() / (a - b).norm(dim=-1))[(distance_a > 0) & (distance_b > 0)]
        assert 0.99 < float(slope.max()) < 1 + 1e-9  # fp64, over steps of up to 1e-3


@EVERY_OBJECT
def test_fronts_differ_from_backs_where_an_object_has_a_front(name):
    points = points_in_ball(40_000)
    turned = points * torch.tensor([-1.0, 1.0, 1.0])
    difference = (signed_distance(name, points, CANONICAL) - signed_distance(name, turned, CANONICAL)).abs().max()
    if name in WITH_A_FRONT:
        assert float(difference) > 0.02
    elif name != "mushroom":  # whose five spots are symmetric in y alone
        assert float(difference) < 1e-6


def test_the_ball_by_hand():
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 0, -0.5]])
    torch.testing.assert_close(signed_distance("ball", points, CANONICAL), torch.tensor([-0.68, 0.32, -0.18]), rtol=0, atol=1e-6)
    larger = torch.ones(1, NUM_PROPORTIONS)
    torch.testing.assert_close(signed_distance("ball", points, larger)[0].item(), -0.68 * 1.15, rtol=0, atol=1e-6)


@EVERY_OBJECT
def test_every_object_is_there_in_every_proportion_and_shows_its_colour(name):
    points = points_in_ball(20_000)
    for proportions in (CANONICAL, torch.ones(1, NUM_PROPORTIONS), -torch.ones(1, NUM_PROPORTIONS)):
        inside = points[signed_distance(name, points, proportions) < 0]
        assert len(inside) > 200  # a hundredth of the ball of radius 1
        colors = {tuple(color) for color in albedo(name, "purple", inside, proportions).tolist()}
        known = {tuple(torch.tensor(color).tolist()) for color in [COLORS["purple"], *ACCENTS.values()]}
        assert tuple(torch.tensor(COLORS["purple"]).tolist()) in colors
        assert colors <= known


@EVERY_OBJECT
def test_a_mirrored_camera_sees_the_mirrored_picture(name):
    proportions = some_proportions(1)
    left, right = (render_object(name, ["green"], proportions, view(azimuth, 20.0), 48) for azimuth in (40.0, -40.0))
    # The four points that a normal is estimated from are not mirrored: pixels at sharp edges are shaded differently.
    difference = (left - right.flip(-1)).abs()
    assert float(difference.mean()) < 1e-3
    assert float(difference.max()) < 0.3


@EVERY_OBJECT
def test_corners_are_white_even_in_the_closest_view(name):
    """For the canonical proportions; the largest cube of all does touch a corner from there."""
    image = render_object(name, ["black"], torch.zeros(1, NUM_PROPORTIONS), view(30.0, 20.0, distance=2.6, fov_deg=36.0), 32)[0]
    assert torch.equal(image[:, [0, 0, -1, -1], [0, -1, 0, -1]], torch.ones(3, 4))
    assert 0.02 < float((image < 1).any(0).float().mean()) < 0.9


@pytest.mark.parametrize("color", list(COLORS))
def test_a_ball_is_coloured_and_lit_as_computed_by_hand(color):
    cameras = view(30.0, 20.0)
    origins, directions = (rays[0] for rays in cast_rays(cameras, 33, 33))
    # Where a ray meets the ball of radius 0.68, and the light there: ambient, key and fill; grazing rays are left out.
    b = (origins * directions).sum(-1)
    discriminant = b.square() - origins.square().sum(-1) + 0.68**2
    hit = discriminant > 0.05
    normal = (origins + (-b - discriminant.clamp_min(0).sqrt())[:, None] * directions)[hit] / 0.68
    key, fill = (normal @ torch.tensor(light) for light in ([0.55, 0.0, 0.835], [-0.9, 0.0, 0.436]))
    light = 0.50 + 0.42 * key.clamp_min(0) + 0.16 * fill.clamp_min(0)
    by_hand = (torch.tensor(COLORS[color]) * light[:, None]).clamp(0, 1)
    image = render_object("ball", [color], CANONICAL, cameras, 33)[0].reshape(3, -1).T[hit]
    assert len(image) > 200
    torch.testing.assert_close(image, by_hand, rtol=0, atol=6e-3)  # a ray stops up to 2e-3 before the surface


def test_silhouettes_fade_into_white_within_a_pixel():
    image = render_object("ball", ["white"], CANONICAL, view(), 64)[0]
    # Nothing is darker than ambient light on the ball, and between that and the background there are rim pixels.
    assert float(image[0].min()) > 0.49 * COLORS["white"][0]
    dark = render_object("ball", ["black"], CANONICAL, view(), 64)[0, 0]
    rim = (dark > 0.2) & (dark < 0.95)
    # The rim of the circle with 20.6 pixels of radius is 130 pixels long.
    assert 60 < int(rim.sum()) < 200


def test_a_red_ball_is_red_and_round():
    image = render_object("ball", ["red"], CANONICAL, view(), 64)[0]
    seen = (image < 0.99).any(0)
    red, green, blue = image[:, seen].mean(1).tolist()
    assert red > 2 * max(green, blue)
    # Seen from 2.9 units the ball's rim is at tan(asin(0.68 / 2.9)); the picture's edge at tan(20.5 degrees).
    radius = (0.68 / 2.9) / (1 - (0.68 / 2.9) ** 2) ** 0.5 / torch.tan(torch.deg2rad(torch.tensor(20.5))).item() * 32
    # Beyond the rim a pixel's coverage falls to nothing within one pixel; the count of pixels on a circle is right to a per cent.
    assert float(seen.sum()) == pytest.approx(torch.pi * (radius + 1) ** 2, rel=0.02)


def test_pictures_of_a_batch_are_those_rendered_alone():
    proportions, cameras = some_proportions(2), look_at_origin(*torch.tensor([[10.0, 200.0], [0, 30], [2.8, 3.0], [40, 44]]))
    together = render_object("duck", ["red", "blue"], proportions, cameras, 24)
    alone = [render_object("duck", [color], proportions[i : i + 1], cameras[i : i + 1], 24) for i, color in enumerate(["red", "blue"])]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)  # fp32, in batches of another size
