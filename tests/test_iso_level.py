"""The level at which a field's surface has its silhouettes: against a ball of which it is known in closed form."""

import math

import pytest
import torch

from dist_vsd.export.seen_color import seen_colors
from dist_vsd.export.surface import find_surface
from dist_vsd.particles.iso_level import _best_level, density_volume, suitable_threshold
from dist_vsd.particles.particle_configs import DenseGridConfig, RadianceFieldConfig
from dist_vsd.particles.radiance_field import RadianceField

RADIUS = 0.6


class Ball(RadianceField):
    """A ball whose density falls linearly from the centre to the radius, or is even inside; red outside of half the radius, else blue."""

    def __init__(self, peak, is_even=False, **options):
        config = RadianceFieldConfig(dense_grid=DenseGridConfig(resolutions=(4,)), num_samples=256, **options)
        super().__init__(config, torch.Generator().manual_seed(0))
        self.peak, self.is_even = peak, is_even

    def forward(self, points):
        share = (1 - points.norm(dim=-1) / RADIUS).clamp_min(0)
        is_outside = (points.norm(dim=-1, keepdim=True) > RADIUS / 2).float()
        density = self.peak * (share > 0).float() if self.is_even else self.peak * share
        return density, torch.cat([is_outside, 0 * is_outside, 1 - is_outside], 1)


def distance_at_which_half_is_seen(peak):
    """Return how far from the centre a ray passes that is half opaque: its thickness is ln 2 there, by bisection."""
    near, far = 0.0, RADIUS
    for _ in range(60):
        middle = (near + far) / 2
        half = math.sqrt(RADIUS**2 - middle**2)
        s = torch.linspace(-half, half, 4001, dtype=torch.float64)
        thickness = torch.trapezoid(peak * (1 - torch.hypot(s, torch.tensor(middle)) / RADIUS), s)
        near, far = (middle, far) if thickness > math.log(2) else (near, middle)
    return near


@pytest.mark.parametrize("peak", [4.0, 20.0])
def test_the_level_of_a_soft_ball_is_its_density_where_a_ray_is_half_opaque(peak):
    field = Ball(peak)
    level = suitable_threshold(field, density_volume(field, 64))
    radius = RADIUS * (1 - level / peak)
    # Silhouettes are told apart by pixels: 64 of them across 2 sqrt(3), the cube's diagonal, seen from a distance of 4.
    assert radius == pytest.approx(distance_at_which_half_is_seen(peak), abs=2 * math.sqrt(3) / 64 / 2)


def test_the_level_of_an_even_ball_puts_the_surface_at_its_edge():
    field = Ball(100.0, is_even=True)
    level = suitable_threshold(field, density_volume(field, 64))
    radii = torch.from_numpy(find_surface(field, 64).vertices).norm(dim=1)
    assert 10 < level < 90
    assert float(radii.mean()) == pytest.approx(RADIUS, abs=2 / 64 / 2)  # half a cell


def test_a_surface_stands_where_the_particle_is_rendered_though_the_field_lies_elsewhere():
    field = Ball(20.0, track_origin=True)
    at_home = suitable_threshold(field, density_volume(field, 64)), find_surface(field, 64)
    field.origin.copy_(torch.tensor([0.2, -0.1, 0.0]))
    away = suitable_threshold(field, density_volume(field, 64)), find_surface(field, 64)
    assert away[0] == pytest.approx(at_home[0], rel=0.05)  # pixels fall otherwise
    assert away[1].vertices.mean(0) == pytest.approx([-0.2, 0.1, 0.0], abs=0.005)


def test_the_best_level_is_found_among_all_and_lies_midway_between_two_rays():
    greatest, solid = torch.tensor([1.0, 9.0, 3.0, 7.0, 2.0]), torch.tensor([False, True, True, True, False])
    assert _best_level(greatest, solid) == 2.5
    # One ray that is opaque without density costs less than the level that would take it in.
    assert _best_level(greatest, torch.tensor([True, True, False, True, False])) == 5.0


def test_a_field_that_is_nowhere_half_opaque_has_no_suitable_level():
    field = Ball(0.5)
    with pytest.raises(ValueError, match="nothing is solid: .* let it train longer, or give --threshold"):
        suitable_threshold(field, density_volume(field, 32))


def test_the_colour_on_a_surface_is_what_light_brings_from_its_depth():
    field, level = Ball(4.0), 1.0
    surface = find_surface(field, 64, level)
    red, green, blue = surface.colors_at(surface.vertices[:50]).T
    # From r = 0.45, where the density is 1, a step of a 32nd inwards each: six before and ten behind, red as far as r = 0.3.
    radii = 0.45 - (torch.arange(-6, 10) + 0.5) / 32
    thickness = 4 * (1 - radii / RADIUS).clamp_min(0) / 32
    weights = (1 - torch.exp(-thickness)) * torch.exp(-(thickness.cumsum(0) - thickness))
    expected = float(weights[radii > 0.3].sum() / weights.sum())
    assert red.mean() == pytest.approx(expected, abs=0.02)  # where a sample falls beside r = 0.3 by the surface's error
    assert blue.mean() == pytest.approx(1 - expected, abs=0.02)
    assert green.max() == 0


def test_another_part_before_the_surface_does_not_colour_it():
    field = Ball(4.0)
    alone = seen_colors(field, density_volume(field, 64), 10.0)(torch.tensor([[0.45, 0.0, 0.0]]))
    plain = field.forward
    wall = torch.tensor([0.0, 1.0, 0.0])
    volume = density_volume(field, 64)
    # Density that rises again further out, as of a beak before a breast.
    field.forward = lambda points: (
        plain(points)[0] + 50 * (points[:, 0] > 0.47),
        torch.where(points[:, :1] > 0.47, wall, plain(points)[1]),
    )
    assert float(seen_colors(field, volume, 10.0)(torch.tensor([[0.45, 0.0, 0.0]]))[0, 1]) < 0.5
    assert float(alone[0, 1]) == 0.0
