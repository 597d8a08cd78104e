"""kernels/compositing.py: emission and absorption, derived anew ray by ray in fp64, and both implementations against it."""

import math

import pytest
import torch

from dist_vsd.kernels.choice import served_by
from dist_vsd.kernels.compositing import accumulate, composite, visible
from dist_vsd.kernels.sampling import Samples
from tests.each_kernel import DEVICE, EACH, drawn, random_samples
from tests.paper_device import DEVICE as PAPER
from tests.paper_device import OnPaper

ROUNDING = {"rtol": 1e-4, "atol": 2e-6}  # fp32: some forty summands, and exp(-x) of x up to some tens
SAMPLES = random_samples()


def field(samples, surfaces=True):
    """Densities, and colours: fog, or none to nearly opaque and surfaces; what it says in left over slots must not matter."""
    num = samples.t.shape[0]
    density = drawn(num, seed=1)
    if surfaces:
        density = 5 * density.square()
        density[::7], density[3::11] = 0, 1e10
    return density, drawn(num, 3, seed=2)


def pulls(samples, dtype=torch.float32):
    """Cotangents of weights, color, opacity and depth."""
    shapes = [(samples.t.shape[0],), (samples.num_rays, 3), (samples.num_rays,), (samples.num_rays,)]
    return [drawn(*shape, seed=20 + i, dtype=dtype) - 0.5 for i, shape in enumerate(shapes)]


def outputs(found):
    return [found.weights, found.color, found.opacity, found.depth]


def reference(density, color, samples):
    """Weights, color, opacity and depth, by products of what samples let through; torch's own derivatives."""
    weights, rays = [], []
    for begin, end in zip(samples.first[:-1].tolist(), samples.first[1:].tolist(), strict=True):
        part = slice(begin, end)
        through = torch.exp(-density[part] * samples.delta[part].double())
        before = torch.cat([through.new_ones(1), through.cumprod(0)])[: end - begin]
        weights.append(before * (1 - through))
        rays.append((weights[-1] @ color[part], weights[-1].sum(), weights[-1] @ samples.t[part].double()))
    weights.append(density.new_zeros(len(density) - int(samples.count)))
    return [torch.cat(weights), *(torch.stack(values) for values in zip(*rays, strict=True))]


def composited(kernels, samples, density, color):
    """All that is composited, and the gradients."""
    density, color = density.clone().requires_grad_(), color.clone().requires_grad_()
    with served_by(kernels):
        found = outputs(composite(density, color, samples))
        return [*(value.detach() for value in found), *torch.autograd.grad(found, (density, color), pulls(samples, density.dtype))]


@pytest.mark.parametrize("surfaces", [True, False])
@EACH
def test_values_and_gradients_are_those_of_products_ray_by_ray_in_double_precision(kernels, surfaces):
    """With empty rays, samples of no density, and ones so dense that nothing behind them is seen; and with fog that all is seen in."""
    counts = SAMPLES.first.diff()
    assert 0 in counts.tolist()
    assert int(counts.max()) > 32 + 1  # more than a block of the kernel's
    density, color = field(SAMPLES, surfaces)
    exact = [value.double().requires_grad_() for value in (density, color)]
    expected = reference(*exact, SAMPLES)
    expected += torch.autograd.grad(expected, exact, [pull.double() for pull in pulls(SAMPLES)])
    for found, value in zip(composited(kernels, SAMPLES, density, color), expected, strict=True):
        torch.testing.assert_close(found.double(), value.detach(), **ROUNDING)


def test_the_gradients_of_plain_torch_equal_finite_differences():
    samples = random_samples(1, 4, 6, 12, torch.float64)
    density, color = (value.requires_grad_() for value in (0.2 + drawn(12, dtype=torch.float64), drawn(12, 3, dtype=torch.float64)))
    assert torch.autograd.gradcheck(lambda *values: outputs(composite(*values, samples)), (density, color))
    assert torch.autograd.gradcheck(lambda values: accumulate(values, samples), density)


def test_in_the_deterministic_mode_an_accelerator_sums_without_cumsum(monkeypatch):
    """On the device on paper, which has a name of its own; torch would refuse a cumsum of floats on CUDA."""
    density, color = field(SAMPLES)
    expected = composite(density, color, SAMPLES)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with OnPaper():
        tensors = [getattr(SAMPLES, name).cpu().to(PAPER) for name in ("ray", "t", "delta", "first")]
        monkeypatch.setattr(torch.Tensor, "cumsum", None)
        found = composite(density.cpu().to(PAPER), color.cpu().to(PAPER), Samples(*tensors, SAMPLES.num_samples, 20))
        torch.testing.assert_close(found.weights.cpu(), expected.weights.cpu(), rtol=1e-4, atol=1e-6)  # fp32


@EACH
def test_huge_densities_give_numbers_and_what_is_behind_them_nothing(kernels):
    first = torch.tensor([0, 3, 4, 4, 5], dtype=torch.int32, device=DEVICE)
    t = torch.tensor([1.0, 2, 3, 1, 1], device=DEVICE)
    samples = Samples(torch.tensor([0, 0, 0, 1, 3], dtype=torch.int32, device=DEVICE), t, torch.full_like(t, 0.5), first, 8, 4)
    density = torch.tensor([2.0, 1e30, 1e30, 1e10, 0.0], device=DEVICE)
    weights, color, opacity, _, for_density, for_color = composited(kernels, samples, density, torch.ones(5, 3, device=DEVICE))
    # exp(-1) of the light passes the first sample, the second takes it all; one alone is opaque, one has no density.
    expected = torch.tensor([1 - math.exp(-1), math.exp(-1), 0, 1, 0], device=DEVICE)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(opacity, torch.tensor([1.0, 1, 0, 0], device=DEVICE), rtol=0, atol=1e-6)
    torch.testing.assert_close(color, opacity[:, None].expand(-1, 3), rtol=0, atol=1e-6)
    assert bool(for_density.isfinite().all())
    assert bool(for_color.isfinite().all())
    assert for_density[1:4].tolist() == [0, 0, 0]  # more or less of what is opaque changes nothing


@EACH
def test_thin_fog_keeps_its_digits(kernels):
    density, color = field(SAMPLES)
    density = torch.full_like(density, 1e-6)
    with served_by(kernels):
        found = composite(density, color, SAMPLES)
    lengths = accumulate(SAMPLES.delta.double(), SAMPLES)
    torch.testing.assert_close(found.opacity.double(), 1e-6 * lengths, rtol=1e-5, atol=0)  # 1 - exp(-x) in fp32 would be off by percents


@EACH
def test_left_over_slots_have_no_weight_and_no_gradient(kernels):
    weights, *_, for_density, for_color = composited(kernels, SAMPLES, *field(SAMPLES))
    with served_by(kernels):
        transmittance = composite(*field(SAMPLES), SAMPLES).transmittance
    left = SAMPLES.filled().logical_not()
    assert bool(left.any())
    assert not any(bool(values[left].any()) for values in (weights, transmittance, for_density, for_color))


def image(samples, density, color, number):
    """One image of several: its samples and their field."""
    rays = slice(number * samples.rays_per_image, (number + 1) * samples.rays_per_image)
    part = slice(int(samples.first[rays.start]), int(samples.first[rays.stop]))
    first = samples.first[rays.start : rays.stop + 1] - part.start
    alone = Samples(samples.ray[part] - rays.start, samples.t[part], samples.delta[part], first, samples.num_samples, len(first) - 1)
    return alone, density[part], color[part], rays, part


@EACH
def test_images_give_the_same_bits_together_and_alone(kernels):
    density, color = field(SAMPLES)
    together = [density.clone().requires_grad_(), color.clone().requires_grad_()]
    with served_by(kernels):
        found = outputs(composite(*together, SAMPLES))
        gradients = torch.autograd.grad(found[1].square().sum(), together)
        for number in (0, 1):
            alone, *leaves, rays, part = image(SAMPLES, density, color, number)
            leaves = [leaf.clone().requires_grad_() for leaf in leaves]
            values = outputs(composite(*leaves, alone))
            assert torch.equal(values[0], found[0][part])
            assert all(torch.equal(one, other[rays]) for one, other in zip(values[1:], found[1:], strict=True))
            found_alone = torch.autograd.grad(values[1].square().sum(), leaves)
            assert all(torch.equal(one, other[part]) for one, other in zip(found_alone, gradients, strict=True))


@EACH
def test_sums_along_rays_are_sums_and_their_gradient_is_the_rays(kernels):
    values = drawn(*SAMPLES.t.shape).requires_grad_()
    with served_by(kernels):
        found = accumulate(values, SAMPLES)
        (gradient,) = torch.autograd.grad(found, values, torch.arange(1.0, 41, device=DEVICE))
    filled = SAMPLES.filled()
    expected = torch.zeros(40, device=DEVICE).index_add_(0, SAMPLES.ray, torch.where(filled, values.detach(), 0))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert torch.equal(gradient, torch.where(filled, SAMPLES.ray + 1.0, 0))


@pytest.mark.parametrize("surfaces", [True, False])
@EACH
def test_what_is_behind_opaque_surfaces_is_left_out_and_changes_nothing(kernels, surfaces):
    density, color = field(SAMPLES, surfaces)
    density = density if surfaces else 20 * density
    with served_by(kernels):
        seen = visible(density, SAMPLES, 500)
        assert int(seen.count) < (0.5 if surfaces else 0.9) * int(SAMPLES.count)
        before = composite(density, color, SAMPLES)
        slots = [first + j for first, n in zip(SAMPLES.first.tolist(), seen.first.diff().tolist(), strict=False) for j in range(n)]
        assert torch.equal(SAMPLES.t[slots], seen.t[: len(slots)])
        assert torch.equal(SAMPLES.ray[slots], seen.ray[: len(slots)])
        kept = torch.zeros_like(before.weights).index_fill_(0, torch.tensor(slots, device=DEVICE), 1.0) > 0
    assert torch.equal(kept, before.transmittance > 1e-4)
    lost = before.opacity - accumulate(torch.where(kept, before.weights, 0), SAMPLES)
    assert float(lost.max()) < 1e-4


@EACH
def test_what_is_visible_and_too_much_is_thinned(kernels):
    with served_by(kernels):
        seen = visible(torch.zeros_like(SAMPLES.t), SAMPLES, 100)  # nothing hides anything
        exact = visible(torch.zeros_like(SAMPLES.t), SAMPLES, None)
    assert torch.equal(exact.t, SAMPLES.t[: int(SAMPLES.count)])
    assert max(int(seen.first[20]), int(seen.count - seen.first[20])) <= 100 < int(SAMPLES.first[20])
    torch.testing.assert_close(accumulate(seen.delta, seen), accumulate(SAMPLES.delta, SAMPLES), rtol=1e-5, atol=0)  # fp32
    assert set(seen.t.tolist()) <= set(SAMPLES.t.tolist())


@EACH
def test_no_rays_give_nothing(kernels):
    samples = random_samples(num_images=0)
    with served_by(kernels):
        found = composite(torch.zeros(0, device=DEVICE), torch.zeros(0, 3, device=DEVICE), samples)
        assert (found.color.shape, found.opacity.shape) == ((0, 3), (0,))
        assert visible(found.weights, samples, 500).t.shape == (0,)


def test_half_precision_is_composited_in_single():
    density, color = field(SAMPLES)
    found = composite(density.clamp(max=100).bfloat16(), color.half(), SAMPLES)
    assert found.color.dtype == found.weights.dtype == torch.float32


@pytest.mark.parametrize("budget", [1, 19])
def test_a_budget_below_one_sample_a_ray_is_refused(budget):
    with pytest.raises(ValueError, match="at least one sample a ray, 20 an image"):
        visible(torch.zeros_like(SAMPLES.t), SAMPLES, budget)
