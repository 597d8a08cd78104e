"""particles/radiance_field.py: the start, backgrounds, the occupancy grid, and what is optimised and saved."""

import math

import pytest
import torch

from dist_vsd.cameras import Cameras, turntable
from dist_vsd.particles.occupancy import make_grid, refresh
from dist_vsd.particles.particle_configs import DenseGridConfig, HashGridConfig, RadianceFieldConfig
from dist_vsd.particles.radiance_field import RadianceField

SMALL = {
    "dense_grid": DenseGridConfig(resolutions=(6, 12)),
    "hash_grid": HashGridConfig(num_levels=4, log2_table_size=10, base_resolution=4, finest_resolution=32),
    "num_samples": 24,
}
KINDS = [{}, {"encoding": "hash"}, {"background": "learned"}, {"encoding": "hash", "background": "random"}]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=["dense", "hash", "learned", "hash-random"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(theta, count, size, seed=0):
    return theta.draw(count, size, generator(seed))


def make(seed=0, **options):
    return RadianceField(RadianceFieldConfig(**(SMALL | options)), generator(seed))


def without_mlp(theta):
    """Silence the MLP: what stays is the start's closed form, in middle grey."""
    torch.nn.init.zeros_(theta.output.weight)
    return theta


def empty(theta):
    """Make the density exp(-100) or less everywhere: below half of fp32's last bit beside 1."""
    theta.output.bias.data[0] = -120.0
    return theta


def cameras(count=2):
    return turntable(count, 15.0, 3.0, 40.0)


@EVERY_KIND
def test_the_start_is_a_soft_ball_by_its_formula(kind):
    points = torch.tensor([[0.0, 0, 0], [0, 0.3, 0.4], [0, 0, 1], [-0.6, 0, 0.8]])
    by_hand = torch.tensor([math.log1p(math.exp(10)), math.log(2), math.log1p(math.exp(-10)), math.log1p(math.exp(-10))])
    density, color = without_mlp(make(**kind))(points)
    torch.testing.assert_close(density, by_hand, rtol=1e-5, atol=0)  # fp32, through exp
    assert torch.equal(color, torch.full((4, 3), 0.5))
    # With the MLP's own start, of the order of the grids' 0.01 and below 0.1, it is nearly that: softplus has a slope of at most 1.
    torch.testing.assert_close(make(**kind).density(points), by_hand, rtol=0, atol=0.1)


def test_a_negative_strength_starts_hollow():
    density = without_mlp(make(density_strength=-10.0, density_radius=1.0)).density(torch.tensor([[0.0, 0, 0], [0, 0, 1]]))
    torch.testing.assert_close(density, torch.tensor([math.log1p(math.exp(-10)), math.log(2)]), rtol=1e-5, atol=0)


@EVERY_KIND
def test_a_render_is_a_picture_with_a_gradient_to_every_parameter(kind):
    theta = make(**kind)
    render = theta.render(cameras(), 12, drawn(theta, 2, 12))
    assert render.image.shape == (2, 3, 12, 12)
    assert render.opacity.shape == (2, 1, 12, 12)
    # Weights sum to one but for fp32 rounding.
    assert -1e-6 <= float(render.image.detach().min()) <= float(render.image.detach().max()) <= 1 + 1e-6
    (render.image * torch.rand(2, 3, 12, 12, generator=generator())).sum().backward()
    silent = [name for name, p in theta.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert silent == []


def test_the_corners_are_white_and_the_middle_is_not():
    image = make().render(cameras(1), 15).image[0].detach()
    corners = image[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    # The corner rays stay outside a radius of 1, where the start's density is below exp(-10): about 1e-5 of opacity.
    torch.testing.assert_close(corners, torch.ones(3, 4), rtol=0, atol=1e-4)
    assert float(image[:, 7, 7].max()) < 0.7


def test_an_empty_field_shows_white_alone():
    render = empty(make()).render(cameras(), 8)
    assert torch.equal(render.image, torch.ones(2, 3, 8, 8))
    assert render.regularizers["opacity"]().item() == 0
    # The binary entropy of the least opacity, 1e-5: 1e-5 ln(1e5) + 1e-5.
    assert render.regularizers["entropy"]().item() == pytest.approx(1e-5 * (math.log(1e5) + 1), rel=0.02)


def test_a_random_background_is_one_colour_a_camera_drawn_from_the_generator():
    theta = empty(make(background="random"))
    image = theta.render(cameras(3), 8, drawn(theta, 3, 8)).image
    assert torch.equal(image, image[:, :, :1, :1].expand_as(image))
    assert len({tuple(color) for color in image[:, :, 0, 0].tolist()}) == 3
    assert torch.equal(theta.render(cameras(3), 8, drawn(theta, 3, 8)).image, image)
    assert not torch.equal(theta.render(cameras(3), 8, drawn(theta, 3, 8, seed=1)).image, image)
    assert torch.equal(theta.render(cameras(3), 8).image, torch.ones_like(image))  # without randomness: white


def test_a_learned_background_is_a_function_of_the_direction_alone():
    theta = empty(make(background="learned"))
    near, far = (theta.render(turntable(2, 15.0, distance, 40.0), 8).image.detach() for distance in (2.0, 4.0))
    torch.testing.assert_close(near, far, rtol=0, atol=1e-6)  # the same directions from two distances, in fp32
    assert float((near - near.mean((2, 3), keepdim=True)).abs().max()) > 0.01


def test_without_draws_a_render_repeats_and_with_them_it_follows_them():
    theta = make()
    draws = [None, None, *(drawn(theta, 2, 8, seed) for seed in (1, 1, 2))]
    render = [theta.render(cameras(), 8, draw).image for draw in draws]
    assert torch.equal(render[0], render[1])
    assert torch.equal(render[2], render[3])
    assert not torch.equal(render[3], render[4])


def test_cameras_of_a_batch_do_not_see_one_another():
    theta, both = make(), cameras(2)
    alone = torch.cat([theta.render(both[i : i + 1], 10).image for i in range(2)])
    torch.testing.assert_close(theta.render(both, 10).image, alone, rtol=0, atol=1e-6)  # fp32 sums in another order


@EVERY_KIND
def test_the_parameter_groups_hold_every_parameter_exactly_once(kind):
    theta = make(encoding_lr=0.1, mlp_lr=0.2, background_lr=0.3, **kind)
    groups = theta.parameter_groups()
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in theta.parameters())
    assert [group["lr"] for group in groups] == [0.1, 0.2, 0.3][: len(groups)]
    assert len(groups) == (3 if theta.config.background == "learned" else 2)


@EVERY_KIND
def test_a_saved_state_renders_the_same_picture_to_the_bit(kind):
    theta, other = make(**kind), make(seed=1, **kind)
    theta.after_update(0, generator(5))
    other.load_state_dict(theta.state_dict())
    assert torch.equal(other.render(cameras(), 8, drawn(theta, 2, 8)).image, theta.render(cameras(), 8, drawn(theta, 2, 8)).image)
    assert torch.equal(other.occupancy.binaries, theta.occupancy.binaries)


def cell_centres(resolution):
    axis = (torch.arange(resolution) + 0.5) / resolution * 2 - 1
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)


def test_nothing_counts_as_empty_before_the_first_refresh():
    assert bool(make().occupancy.binaries.all())


@pytest.mark.parametrize("update", [0, 320])
def test_a_refresh_marks_empty_cells_and_never_cuts_dense_ones(update):
    theta = make(occupancy_resolution=16)
    theta.after_update(0, generator())
    theta.after_update(update, generator(1))
    occupied = theta.occupancy.binaries[0]
    with torch.no_grad():
        density = theta.density(cell_centres(16).reshape(-1, 3)).reshape(16, 16, 16)
    # A sample of 2 / 24 units with this density is as opaque as the threshold, 0.01.
    assert bool(occupied[density * 2 / 24 > 0.01].all())
    assert not bool(occupied[cell_centres(16).norm(dim=-1) > 1].any())


def test_a_refresh_that_saw_a_growing_part_keeps_its_neighbours():
    theta = without_mlp(make(occupancy_resolution=16))
    theta.after_update(0, generator())
    sampled = (theta.occupancy.occs > min(0.01, float(theta.occupancy.occs.mean()))).reshape(16, 16, 16)
    for shift in (-1, 1):
        for axis in range(3):
            assert bool(theta.occupancy.binaries[0][sampled.roll(shift, axis)].all())


def test_a_refresh_draws_nothing_and_looks_at_another_place_of_the_cells_each_time():
    theta, other, asked = make(), make(), []
    state = torch.get_rng_state()
    for update in (0, 16):
        theta.after_update(update, generator(3))
        other.after_update(update, generator(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(theta.occupancy.occs, other.occupancy.occs)
    for number in range(8):
        refresh(theta.occupancy, lambda points: asked.append(points) or points[:, 0], 1.0, 0.1, number, 0.01)
    places = torch.stack([((points + 1) / 2 * 32) % 1 for points in asked])
    torch.testing.assert_close(places, places[:, :1].expand_as(places), rtol=0, atol=1e-4)  # fp32, of 32 cells
    assert float(torch.pdist(places[:, 0]).min()) > 0.2


def test_a_refresh_keeps_what_a_cell_was_known_to_hold_for_a_while():
    grid = make_grid(1.0, 4)
    for number, density in enumerate((8.0, 0.0)):
        refresh(grid, lambda points, d=density: torch.full_like(points[:, 0], d), 1.0, 0.5, number, 0.01)
    torch.testing.assert_close(grid.occs, torch.full((64,), 0.95 * 8 * 0.5))


def test_the_grid_is_refreshed_every_so_many_updates_alone():
    theta = make(occupancy_every=4)
    assert [update for update in range(10) if theta.changes_at(update)] == [0, 4, 8]
    assert bool(theta.occupancy.binaries.all())
    theta.after_update(8, generator())
    assert not bool(theta.occupancy.binaries.all())


def test_a_refresh_hardly_changes_the_picture():
    theta = make(num_samples=48)
    before = theta.render(cameras(), 24).image
    theta.after_update(0, generator())
    # What is cut lies a cell (1/16) beyond a density of 0.24: less than 0.05 of opacity on the longest tangent there.
    torch.testing.assert_close(theta.render(cameras(), 24).image, before, rtol=0, atol=0.05)


def test_fp64_renders_in_fp64():
    theta = make().double()
    wide = Cameras(*(getattr(cameras(1), name).double() for name in ("c2w", "fov", "azimuth_deg", "elevation_deg")))
    assert theta.render(wide, 6, drawn(theta, len(wide), 6)).image.dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"encoding": "octree"}, "field.encoding must be one of dense, hash, got 'octree'"),
        ({"background": "black"}, "field.background must be one of white, learned, random"),
        ({"num_samples": 0}, "field.num_samples must be at least 1, got 0"),
        ({"occupancy_every": 0}, "field.occupancy_every must be at least 1"),
        ({"random_background_share": 1.5}, r"field.random_background_share must be in \[0, 1\], got 1.5: change --field.ran"),
        ({"random_background_share": -0.1}, r"must be in \[0, 1\], got -0.1"),
        ({"bound": 0.0}, "field.bound and density_radius must be positive"),
        ({"density_radius": -1.0}, "got 1.0 and -1.0"),
    ],
)
def test_fields_that_can_not_be_are_refused(changes, rule):
    with pytest.raises(ValueError, match=rule):
        RadianceFieldConfig(**changes)
