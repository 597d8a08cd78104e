"""particles/volume_rendering.py: closed forms of emission and absorption, in fp64 on the CPU's path."""

import math

import pytest
import torch

from dist_vsd.kernels.box import stretch
from dist_vsd.particles.volume_rendering import Rays, Sampling, cells_of, render_rays
from tests.samples import samples_on

ROUNDING = {"rtol": 0, "atol": 1e-12}  # fp64: sums of a few dozen weights
RED, GREEN = torch.eye(3, dtype=torch.float64)[:2]


def vectors(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def grid(resolution=4):
    """An occupancy grid that knows of no empty cell."""
    return torch.ones(resolution, resolution, resolution, dtype=torch.bool)


def render(field, origins, directions, cells=None, bound=1.0, num_samples=32, offset=None, **sampling):
    directions = directions / directions.norm(dim=-1, keepdim=True)
    offset = torch.full((len(origins),), 0.5, dtype=torch.float64) if offset is None else offset
    cells, sampling = grid() if cells is None else cells, Sampling(bound, num_samples, **sampling)
    return render_rays(field, lambda points: field(points)[0], cells, origins, directions, offset, len(origins), sampling)


def fog(density):
    return lambda points: (torch.full_like(points[:, 0], density), RED.expand_as(points))


def ball(points):
    """A ball of radius 0.4, empty outside to the bit, coloured by where it is."""
    return 60 * (0.4 - points.norm(dim=-1)).clamp_min(0), (points + 1) / 2


def random_rays(count=64):
    generator = torch.Generator().manual_seed(0)
    origins = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator, dtype=torch.float64), dim=-1) * 3
    return origins, 0.6 * (torch.rand(count, 3, generator=generator, dtype=torch.float64) * 2 - 1) - origins


def test_rays_meet_the_cube_where_they_should():
    origins = vectors((-3, 0.2, 0.1), (0, 0, 0), (0.5, 0, 3), (-3, 1.5, 0), (-3, 0, 0), (2, 2, 0))
    directions = vectors((1, 0, 0), (0, 1, 0), (0, 0, -1), (1, 0, 0), (-1, 0, 0), (-0.6, -0.8, 0))
    near, length = stretch(origins, directions, 1.0, 1)
    # Through, from within, from above, past it, away from it; the slanted one is in at x = 1 (5/3) and out at y = -1 (3.75).
    torch.testing.assert_close(length, vectors(2, 1, 2, 0, 0, 3.75 - 5 / 3), **ROUNDING)
    torch.testing.assert_close(near[[0, 1, 2, 5]], vectors(2, 0, 2, 5 / 3), **ROUNDING)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bound", [1.0, 0.7])
def test_a_homogeneous_cube_absorbs_one_minus_exp_of_minus_sigma_times_length(axis, sign, bound):
    directions = sign * torch.eye(3, dtype=torch.float64)[axis].expand(3, 3)
    origins = vectors((0.1, -0.2, 0.3), (0.5, 0.6, -0.6), (0, 0, 0)) * (torch.arange(3) != axis) - 3 * directions
    offset = torch.tensor([0.0, 0.3, 0.999], dtype=torch.float64)  # where a sample stands in its interval does not matter here
    rays = render(fog(1.3), origins, directions, bound=bound, offset=offset)
    opacity = 1 - math.exp(-1.3 * 2 * bound)
    torch.testing.assert_close(rays.opacity, vectors(*[opacity] * 3), **ROUNDING)
    torch.testing.assert_close(rays.color, opacity * RED.expand(3, 3), **ROUNDING)
    assert rays.num_evaluated == 3 * 32


def test_a_diagonal_and_a_ray_from_within_are_as_long_as_they_are():
    rays = render(fog(0.5), vectors((-2, -2, -2), (0, 0, 0)), vectors((1, 1, 1), (0, 0, 1)))
    torch.testing.assert_close(rays.opacity, vectors(1 - math.exp(-(3**0.5)), 1 - math.exp(-0.5)), **ROUNDING)


def test_rays_that_miss_the_cube_are_empty_and_ask_nothing():
    rays = render(fog(5.0), vectors((-3, 1.5, 0), (-3, 0, 0)), vectors((1, 0, 0), (-1, 0.1, 0)))
    assert torch.equal(rays.opacity, torch.zeros(2).double())
    assert torch.equal(rays.color, torch.zeros(2, 3).double())
    assert rays.num_evaluated == 0


@pytest.mark.parametrize("forward", [True, False])
def test_two_slabs_composite_front_to_back(forward):
    def field(points):
        behind = points[:, 0] > 0
        return torch.where(behind, points.new_tensor(0.9), 0.4), torch.where(behind[:, None], GREEN, RED)

    sign = 1 if forward else -1
    rays = render(field, vectors((-3 * sign, 0, 0)), vectors((sign, 0, 0)))
    # Each slab is one unit thick: red lets exp(-0.4) through, green exp(-0.9).
    red, green = 1 - math.exp(-0.4), 1 - math.exp(-0.9)
    expected = red * RED + math.exp(-0.4) * green * GREEN if forward else green * GREEN + math.exp(-0.9) * red * RED
    torch.testing.assert_close(rays.color[0], expected, **ROUNDING)
    torch.testing.assert_close(rays.opacity, vectors(1 - math.exp(-1.3)), **ROUNDING)


def test_skipping_empty_cells_changes_nothing_and_asks_at_fewer_points():
    origins, directions = random_rays()
    centres = torch.stack(torch.meshgrid(*[(torch.arange(16) + 0.5) / 8 - 1] * 3, indexing="ij"), -1)
    # A cell is empty when its centre is farther from the ball than half its diagonal, sqrt(3) / 16.
    cells = centres.norm(dim=-1) < 0.4 + 3**0.5 / 16
    everywhere, skipping = render(ball, origins, directions), render(ball, origins, directions, cells)
    torch.testing.assert_close(skipping.color, everywhere.color, **ROUNDING)
    torch.testing.assert_close(skipping.opacity, everywhere.opacity, **ROUNDING)
    assert float(everywhere.opacity.max()) > 0.9
    assert skipping.num_evaluated < everywhere.num_evaluated / 3


def composited(weights, opacity, num_samples):
    """Rays with given weights, all of them on the first; colour and depth play no part in entropies."""
    ray = torch.zeros(len(weights), dtype=torch.int32)
    samples = samples_on(ray, torch.zeros_like(weights), len(opacity), num_samples)
    return Rays(torch.zeros(len(opacity), 3), opacity, weights, samples, torch.zeros_like(opacity))


def bits(p):
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def test_entropies_are_what_a_hand_computes_of_weights_in_bits_and_of_opacities_in_nats():
    weights, opacity = vectors(0.5, 0.25, 0.1, 1.0, 0.0), vectors(0.85, 1.0)
    rays = composited(weights, opacity, num_samples=4)
    # Two rays of four samples each, of which three were skipped; 0.5 has one bit, 0 and 1 count as 1e-5 from there.
    by_hand = (1 + bits(0.25) + bits(0.1) + 2 * bits(1e-5)) / (2 * 4)
    assert rays.weight_entropy().item() == pytest.approx(by_hand, abs=1e-12)
    assert rays.opacity_entropy().item() == pytest.approx((bits(0.85) + bits(1e-5)) / 2 * math.log(2), abs=1e-12)


def test_the_gradient_of_the_weights_entropy_equals_finite_differences():
    weights = vectors(0.5, 0.25, 0.1, 0.93).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: composited(w, torch.ones(2), 4).weight_entropy(), weights)
    origins, directions = random_rays(3)

    def of_densities(density):
        return render(lambda points: (density, torch.zeros(len(points), 3).double()), origins, directions, num_samples=5).weight_entropy()

    assert torch.autograd.gradcheck(of_densities, 1 + torch.rand(15, dtype=torch.float64).requires_grad_())


def test_samples_in_empty_cells_count_in_the_mean_of_the_weights_entropy():
    """However many are skipped, the regulariser pulls alike: the published one evaluates all samples of all rays."""
    origins, directions = random_rays()
    centres = torch.stack(torch.meshgrid(*[(torch.arange(16) + 0.5) / 8 - 1] * 3, indexing="ij"), -1)
    cells = centres.norm(dim=-1) < 0.4 + 3**0.5 / 16
    values, gradients = [], []
    for known in (grid(), cells):
        strength = torch.ones((), dtype=torch.float64, requires_grad=True)
        rays = render(lambda points, s=strength: (s * ball(points)[0], ball(points)[1]), origins, directions, known)
        values.append(rays.weight_entropy())
        gradients.append(torch.autograd.grad(values[-1], strength)[0])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=0)  # fp64
    assert 0 <= (values[0] - values[1]).item() <= bits(1e-5)


def test_no_point_of_an_empty_cell_is_ever_asked():
    cells = grid(resolution=2)
    cells[0] = False  # all cells with x < 0
    asked = []

    def field(points):
        asked.append(points)
        return fog(1.0)(points)

    rays = render(field, vectors((-3, 0.3, 0.3)), vectors((1, 0, 0)), cells)
    assert float(torch.cat(asked)[:, 0].min()) > 0
    torch.testing.assert_close(rays.opacity, vectors(1 - math.exp(-1)), **ROUNDING)


def test_points_find_their_cell_borders_included():
    cells = ~grid(resolution=4)
    cells[0, 2, 3] = True  # x in [-1, -0.5), y in [0, 0.5), z in [0.5, 1]
    points = vectors((-0.9, 0.1, 0.9), (-1, 0, 1), (-0.51, 0.49, 0.5), (-0.49, 0.1, 0.9), (-0.9, 0.5, 0.9), (0.9, 0.1, -0.9))
    assert cells_of(points, cells, 1.0).tolist() == [True, True, True, False, False, False]


def test_gradients_of_colours_and_opacities_equal_finite_differences():
    origins, directions = random_rays(3)
    num_samples = 5

    def rays_of(density, color):
        rays = render(lambda points: (density, color), origins, directions, num_samples=num_samples)
        return rays.color, rays.opacity

    generator = torch.Generator().manual_seed(1)
    density = torch.rand(3 * num_samples, generator=generator, dtype=torch.float64).mul(2).requires_grad_()
    color = torch.rand(3 * num_samples, 3, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(rays_of, (density, color))


def soft_ball(center, strength):
    """A ball whose surface is a few samples thick, with parameters to move."""
    return lambda points: (strength * torch.sigmoid(40 * (0.5 - (points - center).norm(dim=-1))), (points + 1) / 2)


def gradient_of(**sampling):
    """Return the picture of a ball, and how its middle and strength pull on it, for some way of sampling."""
    center, strength = torch.zeros(3, dtype=torch.float64, requires_grad=True), torch.tensor(50.0).double().requires_grad_()
    rays = render(soft_ball(center, strength), *random_rays(), num_samples=48, **sampling)
    wanted = torch.rand(64, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    loss = (rays.color - wanted).square().sum() + 30 * rays.weight_entropy() + rays.depth_variance()
    return rays, torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, (center, strength))])


@pytest.mark.parametrize("size", [1, 100, 10**6])
def test_tiles_change_neither_picture_nor_gradient(size):
    (plain, expected), (tiled, gradient) = gradient_of(), gradient_of(tile_points=size)
    torch.testing.assert_close(tiled.color, plain.color, rtol=0, atol=1e-14)  # functions of one number and of many differ in a last bit
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-11)  # fp64: sums in another order


def test_a_tile_is_asked_again_in_the_backward_pass_and_nothing_of_it_is_held_until_then():
    sizes, held = [], []

    def field(points):
        sizes.append(len(points))
        return soft_ball(weight[:3], weight[3])(points)

    weight = torch.tensor([0.0, 0.0, 0.0, 50.0], dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor.shape) or tensor, lambda tensor: tensor):
        rays = render(field, *random_rays(), tile_points=50)
    num_forward = len(sizes)
    assert max(sizes) == 50
    assert sum(sizes) == rays.num_evaluated
    assert not [shape for shape in held if shape[:1] == (50,) and shape != (50, 3)]  # points alone
    rays.color.sum().backward()
    assert len(sizes) == 2 * num_forward


def test_samples_that_a_surface_hides_are_asked_without_a_gradient_alone_and_hardly_missed():
    (plain, expected), (seen, gradient) = gradient_of(), gradient_of(hidden_below=1e-4)
    assert seen.num_evaluated < 0.7 * plain.num_evaluated
    torch.testing.assert_close(seen.color, plain.color, rtol=0, atol=1e-4)  # less than what is hidden
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_a_budget_that_is_not_reached_changes_nothing_and_one_that_is_thins():
    (plain, expected), (same, gradient) = gradient_of(), gradient_of(samples_per_ray=48)
    assert torch.equal(same.color, plain.color)
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-11)
    thinned, _ = gradient_of(samples_per_ray=8)
    assert thinned.num_evaluated <= 8 * 64 < plain.num_evaluated
    torch.testing.assert_close(thinned.opacity, plain.opacity, rtol=0, atol=0.1)  # steps of a third of a unit through a soft edge
