"""particles/dense_grid.py and hash_grid.py: what trilinear interpolation must do, and Instant-NGP's own formulae."""

import pytest
import torch

from dist_vsd.kernels.choice import served_by
from dist_vsd.kernels.hash_encoding import vertex_index
from dist_vsd.particles.dense_grid import DenseGrid
from dist_vsd.particles.hash_grid import HashGrid, level_resolutions
from dist_vsd.particles.particle_configs import DenseGridConfig, HashGridConfig
from tests.each_kernel import NEEDS_C

# Two levels that fit the table, cell for cell, and two that are hashed.
HASH = HashGridConfig(num_levels=4, num_features=2, log2_table_size=10, base_resolution=4, finest_resolution=32)
DENSE = DenseGridConfig(resolutions=(3, 5, 9), num_features=4)
BOTH = pytest.mark.parametrize("make", [lambda g: DenseGrid(DENSE, g), lambda g: HashGrid(HASH, g)], ids=["dense", "hash"])
ROUNDING = {"rtol": 0, "atol": 1e-13}  # fp64: eight products and their sum


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def points(count=200):
    return torch.rand(count, 3, generator=generator(7), dtype=torch.float64) * 2 - 1


def linear(p):
    """One linear function of x, y and z; trilinear interpolation of its values at vertices gives it back exactly."""
    return 1 + 2 * p[..., 0] - 3 * p[..., 1] + 0.5 * p[..., 2]


@BOTH
def test_both_encodings_have_the_same_interface(make):
    encoding = make(generator())
    features = encoding(points().float())
    assert features.shape == (200, encoding.num_outputs)
    assert features.dtype == torch.float32
    assert torch.equal(make(generator())(points().float()), features)
    assert not torch.equal(make(generator(1))(points().float()), features)


@BOTH
def test_the_weights_of_the_eight_corners_sum_to_one(make):
    encoding = make(generator()).double()
    for values in encoding.parameters():
        values.data.fill_(1.0)
    torch.testing.assert_close(encoding(points()), torch.ones(200, encoding.num_outputs).double(), **ROUNDING)


@BOTH
def test_beyond_the_cube_the_nearest_point_of_its_border_is_taken(make):
    encoding = make(generator()).double()
    beyond = 1.7 * points()
    torch.testing.assert_close(encoding(beyond), encoding(beyond.clamp(-1, 1)), **ROUNDING)


@BOTH
def test_the_gradient_reaches_every_level_and_sums_to_one_for_each_feature_and_point(make):
    encoding = make(generator()).double()
    encoding(points(10)).sum().backward()
    # Each feature of a point is a mean of eight entries with weights that sum to one: ten points give ten a feature.
    for values in encoding.parameters():
        num_features = DENSE.num_features if isinstance(encoding, DenseGrid) else HASH.num_features
        assert float(values.grad.sum()) == pytest.approx(10 * num_features, abs=1e-11)


def test_a_dense_grid_reproduces_a_linear_function_exactly():
    encoding = DenseGrid(DENSE, generator()).double()
    for grid, resolution in zip(encoding.levels, DENSE.resolutions, strict=True):
        axis = torch.linspace(-1, 1, resolution, dtype=torch.float64)
        vertices = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)  # x first, as the grid is indexed
        grid.data.copy_(linear(vertices).expand_as(grid))
    torch.testing.assert_close(encoding(points()), linear(points())[:, None].expand(-1, encoding.num_outputs), **ROUNDING)


@pytest.mark.parametrize("count", [0, 200])
def test_a_dense_grid_and_its_gradient_are_those_of_torchs_grid_sample(count):
    encoding, at = DenseGrid(DENSE, generator()).double(), 1.2 * points(count)  # some lie outside
    volume = at.flip(-1).reshape(1, 1, 1, -1, 3)
    sampled = [torch.nn.functional.grid_sample(v, volume, align_corners=True, padding_mode="border") for v in encoding.levels]
    expected = torch.cat([rows.reshape(DENSE.num_features, -1) for rows in sampled]).T
    cotangent = torch.randn(expected.shape, generator=generator(1), dtype=torch.float64)
    gradients = torch.autograd.grad(expected, list(encoding.levels), cotangent)
    torch.testing.assert_close(encoding(at), expected, **ROUNDING)
    for one, other in zip(torch.autograd.grad(encoding(at), list(encoding.levels), cotangent), gradients, strict=True):
        torch.testing.assert_close(one, other, **ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_point_that_is_no_number_spoils_its_own_features_alone(dtype):
    at = points(3).index_fill(0, torch.tensor([1]), float("nan")).to(dtype)
    assert DenseGrid(DENSE, generator()).to(dtype)(at).isnan().all(1).tolist() == [False, True, False]


@NEEDS_C
@pytest.mark.parametrize(("num_features", "count"), [(4, 200), (3, 65), (1, 64), (70, 5), (4, 0)])
def test_the_kernel_in_c_gives_a_dense_grid_and_its_gradient_as_plain_torch_does(num_features, count):
    """To the rounding of fp32 sums; 70 features are more than it takes, and plain torch serves."""
    encoding, at = DenseGrid(DenseGridConfig(resolutions=(3, 5, 9), num_features=num_features), generator()), 1.2 * points(count).float()
    cotangent, results = torch.randn(count, encoding.num_outputs, generator=generator(1)), []
    for kernels in ("torch", "c"):
        with served_by(kernels):
            encoded = encoding(at)
            results.append([encoded.detach(), *torch.autograd.grad(encoded, list(encoding.levels), cotangent)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_dense_grid_gives_back_the_features_of_a_vertex():
    encoding = DenseGrid(DenseGridConfig(resolutions=(5,), num_features=3), generator()).double()
    vertex = torch.tensor([[-0.5, 0.0, 1.0]], dtype=torch.float64)  # vertices 1, 2 and 4 of -1, -0.5, 0, 0.5, 1
    torch.testing.assert_close(encoding(vertex)[0], encoding.levels[0][0, :, 1, 2, 4], **ROUNDING)


def test_coarse_levels_of_a_hash_grid_map_vertices_one_to_one():
    encoding = HashGrid(HASH, generator())
    assert encoding.resolutions == [4, 8, 16, 32]
    assert [len(table) for table in encoding.tables] == [5**3, 9**3, 1024, 1024]
    for resolution, table in list(zip(encoding.resolutions, encoding.tables, strict=True))[:2]:
        vertices = torch.cartesian_prod(*[torch.arange(resolution + 1)] * 3)
        index = vertex_index(*vertices.unbind(-1), resolution, len(table))
        assert torch.equal(index.sort().values, torch.arange(len(table)))


def test_a_coarse_level_of_a_hash_grid_reproduces_a_linear_function_exactly():
    encoding = HashGrid(HashGridConfig(num_levels=1, base_resolution=6, log2_table_size=10), generator()).double()
    vertices = torch.cartesian_prod(*[torch.arange(7)] * 3)
    encoding.tables[0].data[vertex_index(*vertices.unbind(-1), 6, 343)] = linear(vertices.double() / 3 - 1)[:, None].expand(-1, 2)
    torch.testing.assert_close(encoding(points()), linear(points())[:, None].expand(-1, 2), **ROUNDING)


def test_a_fine_level_hashes_a_vertex_as_instant_ngp_does():
    # 3 xor 5 * 2654435761 xor 7 * 805459861 = 9781445989 = 597012 * 2^14 + 1381.
    assert vertex_index(*torch.tensor([3, 5, 7]), resolution=512, size=2**14).item() == 1381


def test_a_fine_level_returns_the_entry_of_the_hash_at_a_vertex():
    config = HashGridConfig(num_levels=1, base_resolution=16, finest_resolution=16, log2_table_size=8)
    encoding = HashGrid(config, generator()).double()
    entry = (3 ^ (5 * 2_654_435_761) ^ (7 * 805_459_861)) % 2**8
    vertex = torch.tensor([[3.0, 5.0, 7.0]], dtype=torch.float64) / 8 - 1
    torch.testing.assert_close(encoding(vertex)[0], encoding.tables[0][entry], **ROUNDING)


def test_a_point_touches_at_most_eight_entries_of_a_table():
    encoding = HashGrid(HASH, generator())
    encoding(torch.tensor([[0.123, -0.456, 0.789]])).sum().backward()
    assert [1 <= int((table.grad[:, 0] != 0).sum()) <= 8 for table in encoding.tables] == [True] * 4


def test_level_resolutions_follow_instant_ngp_from_16_to_2048():
    resolutions = level_resolutions(HashGridConfig())
    assert (resolutions[0], resolutions[-1], len(resolutions)) == (16, 2048, 16)
    # floor(16 * 128^(l/15)), in whole numbers: n <= 2^(4 + 7l/15) is n^15 <= 2^(60 + 7l).
    for level, n in enumerate(resolutions):
        assert n**15 <= 2 ** (60 + 7 * level) < (n + 1) ** 15


def test_exact_powers_do_not_fall_to_the_integer_below():
    assert level_resolutions(HashGridConfig(num_levels=6, base_resolution=10, finest_resolution=320)) == [10, 20, 40, 80, 160, 320]
    assert level_resolutions(HashGridConfig(num_levels=1, base_resolution=16)) == [16]


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: DenseGridConfig(resolutions=(4, 1)), "dense_grid.resolutions must be 2 or more each"),
        (lambda: DenseGridConfig(resolutions=()), "dense_grid.resolutions"),
        (lambda: DenseGridConfig(num_features=0), "dense_grid.num_features must be at least 1, got 0"),
        (lambda: HashGridConfig(num_levels=0), "hash_grid counts must be at least 1"),
        (lambda: HashGridConfig(base_resolution=64, finest_resolution=32), "at least base_resolution, got 32 < 64"),
    ],
)
def test_grids_that_can_not_be_are_refused(make, rule):
    with pytest.raises(ValueError, match=rule):
        make()
