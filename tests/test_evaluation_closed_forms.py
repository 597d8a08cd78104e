"""evaluation/: entropies, distances and qualities whose values are known."""

import itertools
import math

import pytest
import torch

from dist_vsd.config import CameraConfig
from dist_vsd.evaluation.distributions import (
    entropy_bits,
    entropy_of_counts_bits,
    expected_entropy_bits,
    quality_bits,
    total_variation,
    variety_bits,
)
from dist_vsd.evaluation.fid import frechet_distance
from dist_vsd.evaluation.sphere_quality import sphere_quality
from dist_vsd.evaluation.views import sphere, turns


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 7, 96])
def test_uniform_predictions_have_the_entropy_log_n_and_sure_ones_none(n):
    assert float(entropy_bits(torch.full((n,), 1 / n))) == pytest.approx(math.log2(n), abs=1e-5)
    assert float(entropy_bits(torch.eye(n)).abs().max()) == 0.0


def test_variety_is_never_below_quality():
    predictions = normal(5, 6, 9).softmax(-1)
    assert float(quality_bits(predictions)) < float(variety_bits(predictions)) < math.log2(9)


def test_the_expected_entropy_of_a_few_draws_is_the_mean_over_all_choices():
    labels = [0, 0, 0, 1, 1, 2]
    choices = [torch.bincount(torch.tensor(choice), minlength=4) for choice in itertools.combinations(labels, 3)]
    mean = sum(entropy_of_counts_bits(choice) for choice in choices) / len(choices)
    counts = torch.tensor([3, 2, 1, 0])
    assert expected_entropy_bits(counts, 3) == pytest.approx(mean)
    assert expected_entropy_bits(counts, 6) == expected_entropy_bits(counts, 99) == pytest.approx(entropy_of_counts_bits(counts))
    assert expected_entropy_bits(counts, 1) == 0.0


def test_total_variation_is_0_of_the_same_shares_and_1_of_disjoint_ones():
    assert total_variation(torch.tensor([1, 3]), torch.tensor([10, 30])) == 0.0
    assert total_variation(torch.tensor([4, 0]), torch.tensor([0, 1])) == 1.0
    assert total_variation(torch.tensor([1, 1]), torch.tensor([1, 0])) == 0.5


def test_frechet_distance_of_a_set_with_itself_is_nothing_and_of_a_moved_and_scaled_one_the_closed_form():
    pytest.importorskip("torchmetrics")
    features = normal(200, 5)
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-6)
    shift, scale = torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0], dtype=torch.float64), 1.7
    moved = (features - features.mean(0)) * scale + features.mean(0) + shift
    expected = float(shift.square().sum() + (1 - scale) ** 2 * features.T.cov().trace())
    assert frechet_distance(moved, features) == pytest.approx(expected, rel=1e-9)


def test_an_icosphere_looks_from_all_around_at_the_middle_distance():
    around = sphere(CameraConfig(distance=(2.0, 3.0), fov_deg=(30.0, 50.0)), 1)
    positions = around.cameras.c2w[:, :3, 3]
    assert len(around.neighbours) == 42
    assert len(around.cameras) == 42 * 5
    assert sorted({len(others) for others in around.neighbours}) == [5, 6]
    torch.testing.assert_close(positions.norm(dim=1), torch.full((210,), 2.5))
    torch.testing.assert_close(positions.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(positions[::5], positions[4::5])
    assert torch.rad2deg(around.cameras.fov[2]) == pytest.approx(40.0)


def test_quality_from_all_around_takes_the_best_focal_length_and_forgives_no_lucky_view():
    neighbours = sphere(CameraConfig(), 1).neighbours
    scores = torch.full((42, 5), 0.1)
    scores[:, 3] = 0.3
    assert sphere_quality(scores, neighbours) == pytest.approx(0.3)
    lucky = torch.zeros(42, 5)
    lucky[7, 0] = 1.0
    assert 0.0 < sphere_quality(lucky, neighbours) < 0.2
    lucky[[7, *neighbours[7]], 0] = 1.0
    assert 0.4 < sphere_quality(lucky, neighbours) < 1.0


def test_turns_start_in_front_and_keep_elevations_together():
    cameras = turns(CameraConfig(), 4, (0.0, 30.0))
    assert cameras.azimuth_deg.tolist() == [0.0, 90.0, -180.0, -90.0] * 2
    assert cameras.elevation_deg.tolist() == [0.0] * 4 + [30.0] * 4
