"""kernels/packing.py: fixed numbers of slots, and how an image is thinned to its budget."""

import pytest
import torch

from dist_vsd.kernels.packing import pack, segments, strides


def counts(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize("length", [0, 1, 100])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_what_is_packed_is_what_nonzero_finds_and_empty_slots_hold_one_past_the_end(length, share):
    mask = torch.rand(length, generator=torch.Generator().manual_seed(0)) < share
    found = mask.nonzero().squeeze(-1)
    assert torch.equal(pack(mask, None), found)
    assert torch.equal(pack(mask, length + 5), torch.cat([found, torch.full((length + 5 - len(found),), length)]))
    assert torch.equal(pack(mask, len(found) // 2), found[: len(found) // 2])


def test_segments_begin_where_the_one_before_ends():
    assert segments(counts(2, 0, 3)).tolist() == [0, 2, 2, 5]
    assert segments(counts()).tolist() == [0]


@pytest.mark.parametrize(
    ("budget", "stride"),
    [(None, 1), (13, 1), (12, 2), (7, 2), (6, 4), (4, 4), (3, 8)],
    ids=str,
)
def test_the_stride_is_the_smallest_power_of_two_with_which_an_image_fits(budget, stride):
    # 5 + 0 + 8 samples: 13 as they are, 3 + 4 in pairs, 2 + 2 in fours, 1 + 1 in eights.
    assert strides(counts(5, 0, 8), 3, budget, 8).tolist() == [stride] * 3


@pytest.mark.parametrize("num_samples", [1, 2, 7, 8, 9, 155])
def test_full_rays_fit_into_one_sample_a_ray(num_samples):
    stride = strides(counts(num_samples, num_samples), 2, 2, num_samples)
    assert int((-(-num_samples // stride)).max()) == 1


def test_an_image_is_thinned_for_itself():
    assert strides(counts(5, 8, 5, 2, 0, 0), 2, 7, 8).tolist() == [2, 2, 1, 1, 1, 1]
    assert strides(counts(), 2, 7, 8).tolist() == []


@pytest.mark.parametrize(
    ("num_rays", "budget", "rule"),
    [(4, 1, "at least one sample a ray, 2 an image, got 1: raise"), (3, 9, "whole images of rays_per_image=2, got 3: change")],
)
def test_what_can_not_fit_is_refused(num_rays, budget, rule):
    with pytest.raises(ValueError, match=rule):
        strides(counts(*[1] * num_rays), 2, budget, 8)
