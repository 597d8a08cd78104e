"""kernels/hash_encoding.py: Instant-NGP's formulae with Python's integers, and both implementations against them."""

import itertools
import math

import pytest
import torch

from dist_vsd.kernels.choice import served_by
from dist_vsd.kernels.hash_encoding import hash_encode
from tests.each_kernel import DEVICE, EACH, drawn

RESOLUTIONS = (2, 5, 9, 33)
SIZES = (27, 216, 256, 128)  # the first two one to one, the others hashed
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}  # fp32: sums of eight products, of features up to 2


def tables(num_features=2, dtype=torch.float32):
    return [drawn(size, num_features, seed=level, dtype=dtype) * 4 - 2 for level, size in enumerate(SIZES)]


def points(dtype=torch.float32):
    """At random, on vertices, on faces and beyond the cube."""
    nasty = torch.tensor(list(itertools.product((-1.5, -1.0, -0.6, 0.0, 1.0, 1.2), repeat=3)), dtype=dtype, device=DEVICE)[::3]
    return torch.cat([nasty, drawn(60, 3, seed=9, dtype=dtype) * 2.2 - 1.1])


def entry(vertex, resolution, size):
    x, y, z = vertex
    if (resolution + 1) ** 3 <= size:
        return (z * (resolution + 1) + y) * (resolution + 1) + x
    return (x ^ (y * 2_654_435_761) ^ (z * 805_459_861)) % size


def corners(point, resolution, size):
    """Yield entry and weight of a point's eight corners."""
    scaled = [min(1.0, max(0.0, (p + 1) / 2)) * resolution for p in point]
    lower = [min(resolution - 1, math.floor(s)) for s in scaled]
    for corner in itertools.product((0, 1), repeat=3):
        weights = [s - low if up else 1 - (s - low) for s, low, up in zip(scaled, lower, corner, strict=True)]
        yield entry([low + up for low, up in zip(lower, corner, strict=True)], resolution, size), math.prod(weights)


def reference(at, tables, cotangent):
    """The features, and the tables' gradients, with Python's numbers."""
    features, gradients = torch.zeros_like(cotangent), [torch.zeros_like(table) for table in tables]
    for level, (resolution, table) in enumerate(zip(RESOLUTIONS, tables, strict=True)):
        columns = slice(level * table.shape[1], (level + 1) * table.shape[1])
        for row, point in enumerate(at.tolist()):
            for index, weight in corners(point, resolution, len(table)):
                features[row, columns] += weight * table[index]
                gradients[level][index] += weight * cotangent[row, columns]
    return features, gradients


def encoded(kernels, at, tables, cotangent, count=None):
    tables = [table.clone().requires_grad_() for table in tables]
    with served_by(kernels):
        features = hash_encode(at, tables, RESOLUTIONS, count)
        return features.detach(), torch.autograd.grad(features, tables, cotangent)


@pytest.mark.parametrize("num_features", [1, 2, 3])
@EACH
def test_features_and_gradients_are_those_of_a_loop_in_pythons_numbers(kernels, num_features):
    at, features = points(), tables(num_features)
    cotangent = drawn(len(at), 4 * num_features, seed=11) - 0.5
    exact = reference(at.double(), [table.double() for table in features], cotangent.double())
    found = encoded(kernels, at, features, cotangent)
    torch.testing.assert_close(found[0].double(), exact[0], **ROUNDING)
    for gradient, expected in zip(found[1], exact[1], strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)  # fp32: up to a hundred summands


def test_plain_torch_in_double_precision_equals_the_loop():
    at, features = points(torch.float64)[:20], tables(2, torch.float64)
    cotangent = drawn(20, 8, seed=11, dtype=torch.float64)
    exact, found = reference(at, features, cotangent), encoded("torch", at, features, cotangent)
    for one, other in zip((found[0], *found[1]), (exact[0], *exact[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
    leaves = [table.requires_grad_() for table in features[:2]]
    assert torch.autograd.gradcheck(lambda *tables: hash_encode(at[:5], tables, RESOLUTIONS[:2]), leaves, fast_mode=True)


@EACH
def test_the_hash_of_the_finest_vertices_is_exact_in_32_bits(kernels):
    """A table of its own indices, asked exactly at vertices: y times its prime goes beyond 2^42."""
    vertices = (drawn(100, 3, seed=3, dtype=torch.float64) * 2048).round()
    table = torch.arange(2**19, device=DEVICE, dtype=torch.float32)[:, None]
    with served_by(kernels):
        found = hash_encode((vertices / 1024 - 1).float(), [table], [2048])
    assert found[:, 0].tolist() == [entry(vertex, 2048, 2**19) for vertex in vertices.long().tolist()]


@EACH
def test_a_point_in_the_upper_faces_asks_for_nothing_beyond_its_table(kernels):
    first, second = tables()[:2]
    with served_by(kernels):
        features = hash_encode(torch.ones(1, 3, device=DEVICE), [first, torch.full_like(second, torch.nan)], RESOLUTIONS[:2])
    assert torch.equal(features[0, :2], first[-1])


@EACH
def test_points_beyond_the_count_have_no_features_and_no_gradient(kernels):
    at, features, num = points(), tables(), 70
    cotangent = drawn(len(at), 8, seed=11)
    part = encoded(kernels, at, features, cotangent, torch.tensor(num, device=DEVICE, dtype=torch.int32))
    alone = encoded(kernels, at[:num], features, cotangent[:num])
    assert torch.equal(part[0][:num], alone[0])
    assert not part[0][num:].any()
    for one, other in zip(part[1], alone[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # atomic additions on a GPU come in any order


@EACH
def test_backward_keeps_twelve_bytes_a_point(kernels):
    kept = []
    with served_by(kernels), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        hash_encode(points(), [table.requires_grad_() for table in tables()], RESOLUTIONS)
    assert sum(tensor.nbytes for tensor in kept) == 12 * len(points())


@EACH
def test_no_points_have_no_features_and_gradients_of_zero(kernels):
    features, gradients = encoded(kernels, points()[:0], tables(), torch.zeros(0, 8, device=DEVICE))
    assert features.shape == (0, 8)
    assert not any(gradient.any() for gradient in gradients)


def test_in_the_deterministic_mode_plain_torch_serves(monkeypatch):
    monkeypatch.setattr("dist_vsd.kernels.hash_encoding.serving", lambda *tensors: "triton")
    monkeypatch.setitem(__import__("sys").modules, "dist_vsd.kernels.hash_encoding_triton", None)  # an import of it raises
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert hash_encode(points(), tables(), RESOLUTIONS).shape == (len(points()), 8)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    with pytest.raises(ImportError):
        hash_encode(points(), tables(), RESOLUTIONS)


def test_a_hashed_table_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="must be a power of two, got 100 for 9 cells: change the table's size"):
        hash_encode(points(), [torch.zeros(100, 2)], [9])
