"""The memory of an update at the real sizes of Stable Diffusion, counted on shapes alone: what fits which card."""

import dataclasses

import pytest
import torch

from dist_vsd.commands import train
from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.collectives import Collectives
from dist_vsd.distributed.layout import Layout
from dist_vsd.scaling.counted_memory import CountedMemory, count_peak, count_update
from dist_vsd.scaling.memory import Memory
from dist_vsd.scaling.room import CARDS_GB, TILE_POINTS, card_for, choose_tiles, room_for
from dist_vsd.stopwatch import Stopwatch

GIB = 2**30


def config_of(size, **settings):
    return merge(load_preset("stable-diffusion"), {"prompt": "a duck", "prior": f"random:{size}"} | settings, "test")


def peak_of(size, **settings):
    config = config_of(size, **settings)
    return count_peak(config, Layout.of(config.num_particles)).num_bytes / GIB


def card_of(size_gb, free=1.0):
    return Memory(size_gb * GIB, int(free * size_gb * GIB), "GPU 0")


@pytest.fixture(scope="module")
def sd21():
    return peak_of("sd21")


def test_stable_diffusion_at_512_pixels_fits_a_card_of_12_gb_in_the_tiles_that_it_has_room_for(sd21):
    peaks = {}
    for size_gb in (8, 12):
        tiles = choose_tiles(config_of("sd21"), Layout.of(1), card_of(size_gb))
        peaks[tiles.points] = tiles.peak.num_bytes / GIB
        assert room_for(tiles.peak.num_bytes) <= size_gb * GIB
    assert 4 < min(peaks.values()) < max(peaks.values()) < 10
    assert sd21 == pytest.approx(peaks[0], rel=1e-6)
    assert list(peaks)[1] == 0 < list(peaks)[0]


def test_a_run_on_a_gpu_takes_the_tiles_for_which_all_ranks_have_room_and_says_so(monkeypatch, capsys):
    """By the train command's own function, with a card's memory in the place of a GPU's."""
    monkeypatch.setattr(Memory, "of", lambda _device: card_of(8))
    layout = Layout.of(1)
    settled = train.settle_tiles(config_of("sd21"), layout, torch.device("cuda"), Collectives(layout))
    assert settled.field.tile_points == TILE_POINTS[1]
    assert "in tiles of 2,097,152 points" in capsys.readouterr().out
    latent = merge(load_preset("latent"), {"prompt": "a duck", "prior": "random:tiny", "latent": {"resolution": 8}}, "test")
    layout = Layout.of(latent.num_particles)
    assert train.settle_tiles(latent, layout, torch.device("cuda"), Collectives(layout)) == latent
    assert "points" not in capsys.readouterr().out
    assert train.settle_tiles(config_of("sd21"), Layout.of(1), torch.device("cpu"), Collectives(Layout.of(1))) == config_of("sd21")


def test_sd15_at_512_pixels_fits_a_card_of_12_gb():
    assert 4 < choose_tiles(config_of("sd15"), Layout.of(1), card_of(12)).peak.num_bytes / GIB < 10


def test_xl_at_1024_pixels_fits_a_card_of_24_gb_where_phi_computes_its_activations_again():
    """The refusal of what does not fit says so; and where it would fit an empty card, it is tried."""
    settings = {"render_size": 1024, "field": {"tile_points": TILE_POINTS[-1]}}
    with pytest.raises(ValueError, match=r"can't fit: it takes .* tiles of 131,072 points; GPU 0 has .* it fits with --score.recompute$"):
        choose_tiles(config_of("sdxl", **settings), Layout.of(1), card_of(22))
    tiles = choose_tiles(config_of("sdxl", **settings, score={"recompute": True}), Layout.of(1), card_of(24, free=0.1))
    assert 10 < tiles.peak.num_bytes / GIB < 22
    assert card_for(tiles.peak.num_bytes) == "fits a card of 24 GB"


@pytest.mark.parametrize(("micro_batch_size", "num_views"), [(1, 1), (2, 1), (4, 2)])
def test_many_particles_are_foretold_by_two(micro_batch_size, num_views):
    settings = {"num_particles": 5, "micro_batch_size": micro_batch_size, "num_views": num_views}
    config = merge(load_preset("embedded"), {"prompt": "a duck", "prior": "random:tiny"} | settings, "test")
    layout = Layout.of(5, num_views=num_views)
    assert count_peak(config, layout).num_bytes == pytest.approx(count_update(config, layout, 5).num_bytes, rel=0.03)


def test_each_further_particle_takes_its_parameters_and_moments(sd21):
    """145 MiB: 12.2 million numbers and two moments of each; and what one draws."""
    further = (peak_of("sd21", num_particles=5) - sd21) / 4 * 1024
    assert 140 < further < 145 * 1.1


def test_without_tiles_and_budgets_no_card_holds_it():
    """What the tiles and budgets of the preset are for."""
    plain = {"samples_per_ray": 0, "visible_per_ray": 0, "hidden_below": 0.0}
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
    peaks = [count_peak(each, Layout.of(each.num_particles)).num_bytes for each in (config, offloaded, one)]
    assert peaks[1] == peaks[2] < peaks[0]
