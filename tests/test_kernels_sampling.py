"""kernels/sampling.py: where samples are, by a reference in Python's own numbers; all kernels give the bits of plain torch."""

import itertools

import pytest
import torch

from dist_vsd.kernels.box import stretch
from dist_vsd.kernels.choice import served_by
from dist_vsd.kernels.sampling import sample_occupied
from tests.each_kernel import BOUND, DEVICE, EACH, TRITON_AND_C, drawn, random_cells, random_rays

NUM_SAMPLES = 12


def nasty_rays(dtype=torch.float32):
    """Rays along each axis from outside and from within, in faces, edges and cells' borders, along diagonals, past the cube and away."""
    starts = [(0.1, -0.2, 0.3), (0, 0, 0), (1, 0.5, -0.5), (-1, -1, 0.2), (1, 1, 1), (1.5, 0, 0), (-3, 0, 0), (0, 3, 1), (2, 2, 2)]
    ways = [way for way in itertools.product((-1, 0, 1), repeat=3) if way != (0, 0, 0)]
    pairs = list(itertools.product(starts, ways))
    origins = torch.tensor([start for start, _ in pairs], dtype=torch.float64)
    directions = torch.nn.functional.normalize(torch.tensor([way for _, way in pairs], dtype=torch.float64), dim=-1)
    offsets = torch.tensor([0.0, 0.5, 0.999], dtype=torch.float64)[torch.arange(len(pairs)) % 3]
    return tuple(values.to(DEVICE, dtype) for values in (origins, directions, offsets))


def reference(origins, directions, offsets, cells, num_samples):
    """Each ray's list of (t, step), with Python's floats."""
    rows, resolution, cells = [], cells.shape[0], cells.tolist()
    for origin, way, offset in zip(origins.tolist(), directions.tolist(), offsets.tolist(), strict=True):
        near, far = 0.0, 1e30
        for o, d in zip(origin, way, strict=True):
            if d == 0:
                near, far = (near, far) if abs(o) <= BOUND else (1.0, 0.0)
                continue
            enter, leave = sorted([(-BOUND - o) * (1 / d), (BOUND - o) * (1 / d)])
            near, far = max(near, enter), min(far, leave)
        step, row = max(0.0, far - near) / num_samples, []
        for i in range(num_samples if step > 0 else 0):
            t = near + i * step + offset * step
            point = [o + t * d for o, d in zip(origin, way, strict=True)]
            x, y, z = (min(resolution - 1, max(0, int((p + BOUND) * (resolution / (2 * BOUND))))) for p in point)
            if cells[x][y][z]:
                row.append((t, step))
        rows.append(row)
    return rows


CELLS = {"all": random_cells(share=1.1), "none": random_cells(share=0.0), "some": random_cells(), "even": random_cells(resolution=4)}


@pytest.mark.parametrize("cells", CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("rays", [nasty_rays(torch.float64), random_rays(60, dtype=torch.float64)], ids=["nasty", "random"])
def test_samples_are_where_a_loop_in_pythons_numbers_finds_them(rays, cells):
    samples = sample_occupied(*rays, cells, BOUND, NUM_SAMPLES, len(rays[0]), None)
    rows = reference(*rays, cells, NUM_SAMPLES)
    assert samples.ray.tolist() == [ray for ray, row in enumerate(rows) for _ in row]
    assert samples.t.tolist() == [t for row in rows for t, _ in row]
    assert samples.delta.tolist() == [step for row in rows for _, step in row]
    assert (samples.first[1:] - samples.first[:-1]).tolist() == [len(row) for row in rows]


@pytest.mark.parametrize("kernels", TRITON_AND_C)
@pytest.mark.parametrize("budget", [None, 0.3, 0.05])
@pytest.mark.parametrize("rays", [nasty_rays(), random_rays(200)], ids=["nasty", "random"])
def test_each_kernel_gives_the_bits_of_plain_torch(rays, budget, kernels):
    """Ties included: points that are on a border of two cells are in the same one in both."""
    num_rays = len(rays[0])
    budget = None if budget is None else max(num_rays // 2, int(budget * num_rays * NUM_SAMPLES))
    for cells in CELLS.values():
        both = []
        for by in ("torch", kernels):
            with served_by(by):
                both.append(sample_occupied(*rays, cells, BOUND, NUM_SAMPLES, num_rays // 2, budget))
        for name in ("ray", "t", "delta", "first"):
            assert torch.equal(*(getattr(samples, name) for samples in both)), name


@EACH
def test_rays_in_a_face_and_from_within_are_as_long_as_they_are(kernels):
    rows = [((1, 0, -3), (0, 0, 1), 2), ((-1, 0, -3), (0, 0, 1), 2), ((0, 0, 0), (0, 1, 0), 1), ((1.001, 0, -3), (0, 0, 1), 0)]
    origins, directions = (torch.tensor([row[i] for row in rows], dtype=torch.float32, device=DEVICE) for i in (0, 1))
    with served_by(kernels):
        samples = sample_occupied(origins, directions, torch.full_like(origins[:, 0], 0.5), CELLS["all"], BOUND, NUM_SAMPLES, 4, None)
    lengths = torch.zeros(4, device=DEVICE).index_add_(0, samples.ray, samples.delta)
    torch.testing.assert_close(lengths.cpu(), torch.tensor([float(row[2]) for row in rows]), rtol=1e-6, atol=0)  # fp32: a dozen summands


def test_rays_that_miss_the_cube_begin_and_end_at_zero():
    """Not at the distances of its planes, which of parallel ones are beyond all bounds."""
    origins = torch.tensor([[1.5, 0.0, -3.0], [3.0, 3.0, 3.0], [0.0, 0.0, 3.0]])
    directions = torch.tensor([[0.0, 0.0, 1.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
    near, step = stretch(origins, directions, BOUND, NUM_SAMPLES)
    assert near.tolist() == step.tolist() == [0, 0, 0]


@EACH
def test_an_image_over_budget_is_thinned_and_the_one_beside_it_is_not(kernels):
    rays = random_rays(20)
    rays = tuple(torch.cat([values, values]) for values in rays)
    rays[0][20:] += torch.tensor([0.0, 0.0, 0.9], device=DEVICE)  # the second image sees less of the cube
    with served_by(kernels):
        whole = sample_occupied(*rays, CELLS["all"], BOUND, NUM_SAMPLES, 20, None)
        count = int(whole.first[40] - whole.first[20])
        thinned = sample_occupied(*rays, CELLS["all"], BOUND, NUM_SAMPLES, 20, count)
    begin, end = int(thinned.first[20]), int(thinned.first[40])
    assert end - begin == count < int(whole.first[20])
    assert begin <= count
    assert torch.equal(thinned.t[begin:end], whole.t[whole.first[20] :])
    pairs = [set(zip(samples.ray.tolist(), samples.t.tolist(), strict=True)) for samples in (whole, thinned)]
    assert pairs[1] - {(39, 0.0)} <= pairs[0]  # every sample that is left is one of those there were; (39, 0) are empty slots
    lengths = [torch.zeros(40, device=DEVICE).index_add_(0, samples.ray, samples.delta) for samples in (whole, thinned)]
    torch.testing.assert_close(*lengths, rtol=1e-6, atol=0)  # fp32


@EACH
def test_images_give_the_same_bits_together_and_alone(kernels):
    rays = random_rays(60)
    with served_by(kernels):
        together = sample_occupied(*rays, CELLS["some"], BOUND, NUM_SAMPLES, 20, 70)
        for image in range(3):
            part = slice(20 * image, 20 * image + 20)
            alone = sample_occupied(*(values[part] for values in rays), CELLS["some"], BOUND, NUM_SAMPLES, 20, 70)
            begin, end = int(together.first[part.start]), int(together.first[part.stop])
            assert torch.equal(alone.t[: end - begin], together.t[begin:end])
            assert torch.equal(alone.delta[: end - begin], together.delta[begin:end])
            assert torch.equal(alone.first, together.first[part.start : part.stop + 1] - begin)


@EACH
def test_left_over_slots_are_harmless_and_there_may_be_nothing_at_all(kernels):
    with served_by(kernels):
        samples = sample_occupied(*random_rays(10), CELLS["some"], BOUND, NUM_SAMPLES, 5, 100)
        nothing = sample_occupied(*random_rays(0), CELLS["some"], BOUND, NUM_SAMPLES, 5, 100)
    left = samples.filled().logical_not()
    assert samples.t.shape == (200,)
    assert int(left.sum()) == 200 - int(samples.count)
    assert samples.ray[left].unique().tolist() == [9]
    assert samples.t[left].unique().tolist() == samples.delta[left].unique().tolist() == [0.0]
    assert (nothing.t.shape, nothing.first.tolist(), nothing.num_rays) == ((0,), [0], 0)


def test_a_sample_more_or_less_is_all_that_precision_changes():
    exact = sample_occupied(*random_rays(200, dtype=torch.float64), CELLS["some"], BOUND, NUM_SAMPLES, 200, None)
    rounded = sample_occupied(*random_rays(200), CELLS["some"], BOUND, NUM_SAMPLES, 200, None)
    assert int((exact.first.diff() - rounded.first.diff()).abs().sum()) <= 2  # of some thousand, those within 1e-7 of a border
    assert drawn(1).dtype == rounded.t.dtype == torch.float32
