"""The memory of an update at the real sizes of Stable Diffusion, counted on shapes alone: what fits which card."""

import dataclasses

import pytest
import torch

from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.scaling.counted_memory import CARDS_GB, CountedMemory, card_for, count_peak
from dist_vsd.stopwatch import Stopwatch

GIB = 2**30


def peak_of(size, **settings):
    config = merge(load_preset("stable-diffusion"), {"prompt": "a duck", "prior": f"random:{size}"} | settings, "test")
    return count_peak(config, Layout.of(config.num_particles)).peak_bytes / GIB


@pytest.fixture(scope="module")
def sd21():
    return peak_of("sd21")


@pytest.mark.parametrize("size", ["sd15", "sd21"])
def test_stable_diffusion_at_512_pixels_fits_a_card_of_12_gb(size, sd21):
    peak = sd21 if size == "sd21" else peak_of(size)
    assert 4 < peak < 10
    assert card_for(int(peak * GIB)) in ("fits a card of 8 GB", "fits a card of 12 GB")


def test_xl_at_1024_pixels_fits_a_card_of_24_gb_where_phi_computes_its_activations_again():
    peak = peak_of("sdxl", render_size=1024, score={"recompute": True})
    assert 10 < peak < 22
    assert card_for(int(peak * GIB)) == "fits a card of 24 GB"


def test_each_further_particle_takes_its_parameters_and_moments(sd21):
    """145 MiB: 12.2 million numbers and two moments of each; and what one draws."""
    further = (peak_of("sd21", num_particles=5) - sd21) / 4 * 1024
    assert 140 < further < 145 * 1.1


def test_without_tiles_and_budgets_no_card_holds_it():
    """What the tiles and budgets of the preset are for."""
    plain = {"samples_per_ray": 0, "visible_per_ray": 0, "hidden_below": 0.0, "tile_points": 0}
    assert peak_of("sd21", field=plain) > 40


def test_memory_is_counted_from_its_making_to_its_end_by_the_stage_that_is_going_on():
    stopwatch, device = Stopwatch(torch.device("cpu"), measures=False), torch.device("meta")
    with CountedMemory(device) as memory:
        kept = torch.empty(1024, device=device)
        with stopwatch.stage("render"):
            torch.empty(4096, device=device)
            torch.empty(10**6)  # of another device
        view = kept[1:]
    del kept
    assert (memory.live_bytes, memory.peak_bytes, memory.peak_stage) == (4096, 5 * 4096, "render")
    del view
    assert memory.live_bytes == 0


def test_a_card_is_named_with_room_to_spare_or_none():
    assert card_for(0) == f"fits a card of {CARDS_GB[0]} GB"
    assert card_for(22 * GIB) == "fits a card of 24 GB"
    assert card_for(22 * GIB + 1) == "fits a card of 32 GB"
    assert card_for(500 * GIB).startswith("fits no card")


def test_offloaded_particles_do_not_count():
    config = merge(load_preset("embedded"), {"prompt": "a duck", "num_particles": 40, "prior": "random:tiny"}, "test")
    offloaded = dataclasses.replace(config, particles=dataclasses.replace(config.particles, offload=True))
    one = dataclasses.replace(config, num_particles=1)
    peaks = [count_peak(each, Layout.of(each.num_particles)).peak_bytes for each in (config, offloaded, one)]
    assert peaks[1] == peaks[2] < peaks[0]
