"""particles/volume_rendering.py: closed forms of emission and absorption, in fp64 on the CPU's path."""

import importlib.util
import math
import sys

import nerfacc
import pytest
import torch

from dist_vsd.particles.volume_rendering import Rays, box_interval, has_marching_kernels, occupied, render_marched, render_stratified

ROUNDING = {"rtol": 0, "atol": 1e-12}  # fp64: sums of a few dozen weights
RED, GREEN = torch.eye(3, dtype=torch.float64)[:2]


def vectors(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def grid(resolution=4, bound=1.0):
    """An occupancy grid that knows of no empty cell."""
    estimator = nerfacc.OccGridEstimator([-bound] * 3 + [bound] * 3, resolution=resolution)
    estimator.binaries.fill_(True)
    return estimator


def render(field, origins, directions, estimator=None, bound=1.0, num_samples=32, offset=None):
    directions = directions / directions.norm(dim=-1, keepdim=True)
    offset = torch.full((len(origins),), 0.5, dtype=torch.float64) if offset is None else offset
    return render_stratified(field, estimator or grid(bound=bound), origins, directions, bound, num_samples, offset)


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
    near, far = box_interval(origins, directions, 1.0)
    # Through, from within, from above, past it, away from it; the slanted one is in at x = 1 (5/3) and out at y = -1 (3.75).
    torch.testing.assert_close(far - near, vectors(2, 1, 2, 0, 0, 3.75 - 5 / 3), rtol=0, atol=1e-8)  # a zero direction counts as 1e-9
    torch.testing.assert_close(near[[0, 1, 2, 5]], vectors(2, 0, 2, 5 / 3), rtol=0, atol=1e-8)


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
    estimator = grid(resolution=16)
    centres = torch.stack(torch.meshgrid(*[(torch.arange(16) + 0.5) / 8 - 1] * 3, indexing="ij"), -1)
    # A cell is empty when its centre is farther from the ball than half its diagonal, sqrt(3) / 16.
    estimator.binaries.copy_((centres.norm(dim=-1) < 0.4 + 3**0.5 / 16)[None])
    everywhere, skipping = render(ball, origins, directions), render(ball, origins, directions, estimator)
    torch.testing.assert_close(skipping.color, everywhere.color, **ROUNDING)
    torch.testing.assert_close(skipping.opacity, everywhere.opacity, **ROUNDING)
    assert float(everywhere.opacity.max()) > 0.9
    assert skipping.num_evaluated < everywhere.num_evaluated / 3


def composited(weights, opacity, num_samples):
    """Rays with given weights; colour, depth and which ray each sample is on play no part in entropies."""
    nothing = torch.zeros_like(weights)
    return Rays(torch.zeros(len(opacity), 3), opacity, weights, nothing, nothing.long(), num_samples)


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
    estimator = grid(resolution=16)
    centres = torch.stack(torch.meshgrid(*[(torch.arange(16) + 0.5) / 8 - 1] * 3, indexing="ij"), -1)
    estimator.binaries.copy_((centres.norm(dim=-1) < 0.4 + 3**0.5 / 16)[None])
    values, gradients = [], []
    for cells in (grid(), estimator):
        strength = torch.ones((), dtype=torch.float64, requires_grad=True)
        rays = render(lambda points, s=strength: (s * ball(points)[0], ball(points)[1]), origins, directions, cells)
        values.append(rays.weight_entropy())
        gradients.append(torch.autograd.grad(values[-1], strength)[0])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=0)  # fp64
    assert 0 <= (values[0] - values[1]).item() <= bits(1e-5)


def test_no_point_of_an_empty_cell_is_ever_asked():
    estimator = grid(resolution=2)
    estimator.binaries[0, 0] = False  # all cells with x < 0
    asked = []

    def field(points):
        asked.append(points)
        return fog(1.0)(points)

    rays = render(field, vectors((-3, 0.3, 0.3)), vectors((1, 0, 0)), estimator)
    assert float(torch.cat(asked)[:, 0].min()) > 0
    torch.testing.assert_close(rays.opacity, vectors(1 - math.exp(-1)), **ROUNDING)


def test_points_find_their_cell_borders_included():
    estimator = grid(resolution=4)
    estimator.binaries.fill_(False)
    estimator.binaries[0, 0, 2, 3] = True  # x in [-1, -0.5), y in [0, 0.5), z in [0.5, 1]
    points = vectors((-0.9, 0.1, 0.9), (-1, 0, 1), (-0.51, 0.49, 0.5), (-0.49, 0.1, 0.9), (-0.9, 0.5, 0.9), (0.9, 0.1, -0.9))
    assert occupied(points, estimator, 1.0).tolist() == [True, True, True, False, False, False]


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


def test_without_compiled_kernels_no_compiler_is_called():
    """nerfacc would look for nvcc when it is first asked to march."""
    has_marching_kernels.cache_clear()
    found = importlib.util.find_spec("nerfacc.csrc")
    assert has_marching_kernels() == (found is not None)
    assert found is not None or "nerfacc.cuda._backend" not in sys.modules


@pytest.mark.skipif(not (torch.cuda.is_available() and has_marching_kernels()), reason="nerfacc's marching wants a GPU and its kernels")
def test_marching_on_cuda_agrees_with_stratified_samples():
    origins, directions = (t.float().cuda() for t in random_rays())
    directions = directions / directions.norm(dim=-1, keepdim=True)
    estimator, offset = grid(resolution=16).cuda(), torch.full((64,), 0.5, device="cuda")
    stratified = render_stratified(ball, estimator, origins, directions, 1.0, 512, offset)
    marched = render_marched(ball, estimator, origins, directions, 1.0, 512, torch.zeros(len(origins), device=origins.device))
    # Both are midpoint sums with steps of at most 2 sqrt(3) / 512 = 0.007 of a density of up to 24: 0.16 an interval at the most.
    torch.testing.assert_close(marched.opacity, stratified.opacity, rtol=0, atol=0.05)
    torch.testing.assert_close(marched.color, stratified.color, rtol=0, atol=0.05)
