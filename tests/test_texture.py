"""evaluation/texture.py: fine texture and copies, by pictures whose figures are known."""

import math

import pytest
import torch

from dist_vsd.evaluation.texture import finest_octave, nearest_distance, nearest_distance_of_themselves


def test_what_is_constant_over_blocks_of_two_pixels_has_no_fine_texture_and_a_chessboard_nothing_else():
    blocks = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert finest_octave(blocks) == pytest.approx(0.0, abs=1e-6)
    chessboard = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(1, 1, 4, 4)
    assert finest_octave(0.3 * chessboard + 5.0) == pytest.approx(0.3)


def test_of_white_noise_three_fourths_of_the_variance_are_fine():
    noise = 2 * torch.randn(8, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    assert finest_octave(noise) == pytest.approx(2 * math.sqrt(0.75), rel=0.01)  # the mean of four keeps a fourth


def test_copies_are_near_and_what_resembles_nothing_is_far():
    others = torch.eye(6)[:3]
    assert nearest_distance(others[[2, 0, 0]], others) == pytest.approx(0.0)
    assert nearest_distance(torch.eye(6)[3:], others) == pytest.approx(1.0)
    half = torch.nn.functional.normalize(torch.eye(6)[0] + torch.eye(6)[5], dim=0)[None]
    assert nearest_distance(half, others) == pytest.approx(1 - math.sqrt(0.5))


def test_of_a_set_itself_a_picture_is_not_its_own_nearest():
    pair = torch.eye(4)[[0, 1]]
    assert nearest_distance_of_themselves(pair) == pytest.approx(1.0)
    assert nearest_distance_of_themselves(pair[[0, 0, 1, 1]]) == pytest.approx(0.0)
