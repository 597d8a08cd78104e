"""diffusion/timesteps.py: the range of t, that each of it is equally likely, annealing and weights by hand."""

import pytest
import torch

from dist_vsd.diffusion.timesteps import TimestepConfig, draw_timesteps, range_at, timestep_weight

LOWEST, HIGHEST = torch.zeros(1), torch.tensor([1 - 2.0**-24])  # the ends of what torch.rand can return


@pytest.mark.parametrize(
    ("low", "high", "num_timesteps", "first", "last"),
    [(0.02, 0.98, 1000, 20, 980), (0.02, 0.5, 1000, 20, 500), (0.0, 1.0, 1000, 0, 999), (0.5, 0.5, 10, 5, 5)],
)
def test_both_ends_of_the_range_are_reached_and_never_passed(low, high, num_timesteps, first, last):
    assert draw_timesteps(LOWEST, low, high, num_timesteps).tolist() == [first]
    assert draw_timesteps(HIGHEST, low, high, num_timesteps).tolist() == [last]
    t = draw_timesteps(torch.rand(20_000, generator=torch.Generator().manual_seed(0)), low, high, num_timesteps)
    assert t.dtype == torch.int64
    assert first <= t.min() <= t.max() <= last


@pytest.mark.parametrize(("low", "high", "values"), [(0.2, 0.8, range(2, 9)), (0.0, 1.0, range(10)), (0.0, 0.9, range(10))])
def test_evenly_spaced_uniforms_are_dealt_evenly_over_the_timesteps(low, high, values):
    # Middles of 12 intervals a value: none lies at a border, so each value gets 12, no more and no less.
    num_draws = 12 * len(values)
    t = draw_timesteps((torch.arange(num_draws) + 0.5) / num_draws, low, high, 10)
    assert torch.bincount(t, minlength=10).tolist() == [12 if value in values else 0 for value in range(10)]


def test_random_draws_pass_a_chi_square_test_of_uniformity():
    t = draw_timesteps(torch.rand(192_200, generator=torch.Generator().manual_seed(0)), 0.02, 0.98, 1000)
    counts = torch.bincount(t, minlength=981)[20:].double()
    assert len(counts) == 961
    # 200 expected in each of 961 bins: chi-square has mean 960 and standard deviation sqrt(2 * 960) = 43.8; five of them.
    assert abs(float(((counts - 200).square() / 200).sum()) - 960) < 219


@pytest.mark.parametrize(
    ("annealing", "at_start", "just_before", "at_anneal", "at_twice", "at_end"),
    [("stepped", 0.98, 0.98, 0.5, 0.5, 0.5), ("smooth", 0.98, 0.74, 0.74, 0.5, 0.5), ("none", 0.98, 0.98, 0.98, 0.98, 0.98)],
)
def test_the_highest_t_over_a_run(annealing, at_start, just_before, at_anneal, at_twice, at_end):
    config = TimestepConfig(annealing=annealing, anneal_at=0.25)
    progress = [0.0, 0.25 - 1e-12, 0.25, 0.5, 1.0]
    values = [range_at(config, p)[1] for p in progress]
    # (0.98 + 0.50) / 2 = 0.74 half-way down the cosine; fp64 rounding, and 1e-12 of progress, are all that differs.
    assert values == pytest.approx([at_start, just_before, at_anneal, at_twice, at_end], abs=1e-11)


def test_smooth_annealing_has_the_mean_of_the_step_and_never_rises():
    smooth, stepped = (TimestepConfig(annealing=kind, anneal_at=0.3) for kind in ("smooth", "stepped"))
    progress = [(i + 0.5) / 10_000 for i in range(10_000)]
    values = [range_at(smooth, p)[1] for p in progress]
    # The midpoint rule on 10,000 points is right to 1e-8 for a cosine, and exact for a step at a border of the grid.
    assert sum(values) / 10_000 == pytest.approx(sum(range_at(stepped, p)[1] for p in progress) / 10_000, abs=1e-7)
    assert all(b <= a for a, b in zip(values, values[1:], strict=False))


def test_descending_t_falls_from_the_highest_to_the_lowest_within_its_jitter():
    config = TimestepConfig(annealing="descending", min_fraction=0.02, max_fraction=0.98, jitter=0.05)
    ranges = [range_at(config, p) for p in (0.0, 0.5, 0.75, 1.0)]
    assert ranges == [pytest.approx(pair) for pair in ((0.93, 0.98), (0.45, 0.55), (0.21, 0.31), (0.02, 0.07))]
    exact = TimestepConfig(annealing="descending", jitter=0.0)
    assert [range_at(exact, p) for p in (0.25, 0.5)] == [pytest.approx((t, t)) for t in (0.74, 0.5)]


@pytest.mark.parametrize(("weighting", "expected"), [("sigma_squared", 0.64), ("uniform", 1.0), ("alpha_sigma", 0.48)])
def test_weights_by_hand(weighting, expected):
    alpha_t, sigma_t = torch.full((2, 1, 1, 1), 0.6, dtype=torch.float64), torch.full((2, 1, 1, 1), 0.8, dtype=torch.float64)
    w_t = timestep_weight(weighting, alpha_t, sigma_t)
    assert w_t.shape == (2, 1, 1, 1)
    torch.testing.assert_close(w_t, torch.full_like(alpha_t, expected), rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"min_fraction": -0.1}, "min_fraction < late_max_fraction"),
        ({"min_fraction": 0.5}, "got 0.5, 0.5, 0.98"),
        ({"late_max_fraction": 0.99}, "late_max_fraction <= max_fraction"),
        ({"max_fraction": 1.1}, "max_fraction <= 1"),
        ({"anneal_at": 1.5}, r"anneal_at must be in \[0, 1\], got 1.5"),
        ({"jitter": 1.5}, "timesteps.jitter must be in \\[0, 1\\], got 1.5"),
        ({"annealing": "steep"}, "one of stepped, smooth, descending, none, got 'steep'"),
        ({"weighting": "sigma"}, "one of sigma_squared, uniform, alpha_sigma, got 'sigma'"),
    ],
)
def test_a_range_or_word_that_can_not_be_is_refused(changes, rule):
    with pytest.raises(ValueError, match=rule):
        TimestepConfig(**changes)
