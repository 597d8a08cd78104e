"""The difference of the scores by noise level, over all updates since the last line and over all ranks."""

import math

import pytest
import torch

from dist_vsd.reporting.window import BAND_NAMES, Window, means_by_band, sums_by_band


def test_norms_are_summed_by_their_band_of_t():
    gaps = [(torch.tensor([0.0, 0.199, 0.2]), torch.tensor([1.0, 2.0, 4.0])), (torch.tensor([0.999]), torch.tensor([8.0]))]
    assert sums_by_band(gaps) == [(3.0, 2), (4.0, 1), (0.0, 0), (0.0, 0), (8.0, 1)]


def test_only_bands_that_were_seen_are_told():
    means = means_by_band([sums_by_band([(torch.tensor([0.5]), torch.tensor([6.0]))])])
    assert means == {"score/gap_t0.4-0.6": 6.0}
    assert means_by_band([sums_by_band([])]) == {}


def test_the_mean_is_over_renders_whatever_each_ranks_share():
    one = sums_by_band([(torch.full((3,), 0.1), torch.tensor([1.0, 2.0, 3.0]))])
    other = sums_by_band([(torch.tensor([0.1]), torch.tensor([10.0]))])
    assert means_by_band([one, other, sums_by_band([])]) == {BAND_NAMES[0]: 4.0}


def test_what_is_not_finite_is_left_out():
    gaps = [(torch.tensor([0.1, 0.1, 0.1]), torch.tensor([math.nan, 2.0, math.inf]))]
    assert sums_by_band(gaps)[0] == (2.0, 1)


def test_a_window_begins_anew_when_it_is_taken():
    window = Window()
    for _ in range(4):
        window.add([(torch.tensor([0.9]), torch.tensor([1.0]))])
    sums, rate = window.take()
    assert sums[4] == (4.0, 4)
    assert rate > 0
    sums, rate = window.take()
    assert sums == [(0.0, 0)] * 5
    assert rate == 0


@pytest.mark.parametrize("weighting", ["sigma_squared", "one", "alpha_sigma"])
def test_the_gap_is_the_norm_of_the_difference_of_the_scores_whatever_w_t(weighting):
    from types import SimpleNamespace

    from dist_vsd.diffusion.process import VariancePreserving
    from dist_vsd.diffusion.timesteps import timestep_weight
    from dist_vsd.objectives.objective import of_scores

    schedule = VariancePreserving(torch.linspace(0.999, 0.01, 1000).double())
    difference, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([20, 500, 980])
    w_t = timestep_weight(weighting, *schedule.alpha_sigma(t, difference))
    gap = of_scores(SimpleNamespace(w_t=w_t, x_0=difference), w_t * difference, has_phi=True).score_gap
    torch.testing.assert_close(gap, difference.flatten(1).norm(dim=1))
