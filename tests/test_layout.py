"""distributed/layout.py: every deal of up to 12 particles over up to 12 ranks."""

import re

import pytest

from dist_vsd.distributed.layout import Layout

PAIRS = [(n, w) for n in range(1, 13) for w in range(1, 13)]
FITTING = [(n, w) for n, w in PAIRS if n >= w or w % n == 0]
REFUSED = [pair for pair in PAIRS if pair not in FITTING]


def ranks(num_particles, world_size):
    return [Layout.of(num_particles, world_size, rank) for rank in range(world_size)]


@pytest.mark.parametrize(("num_particles", "world_size"), FITTING)
def test_every_particle_is_owned_exactly_once_and_shards_differ_by_at_most_one(num_particles, world_size):
    layouts = ranks(num_particles, world_size)
    shards = {layout.shard: list(layout.particles) for layout in layouts}
    assert sum((shards[s] for s in sorted(shards)), []) == list(range(num_particles))
    assert max(map(len, shards.values())) - min(map(len, shards.values())) <= 1
    assert min(map(len, shards.values())) >= 1
    assert len(shards) == min(num_particles, world_size)


@pytest.mark.parametrize(("num_particles", "world_size"), FITTING)
def test_each_shard_has_one_rank_for_each_view(num_particles, world_size):
    layouts = ranks(num_particles, world_size)
    seen = [(layout.shard, layout.view) for layout in layouts]
    num_views = layouts[0].num_views
    assert seen == [(shard, view) for shard in range(world_size // num_views) for view in range(num_views)]
    assert num_views == max(1, world_size // num_particles)


@pytest.mark.parametrize(("num_particles", "world_size"), FITTING)
def test_the_owner_of_a_particle_is_view_0_of_the_shard_that_holds_it(num_particles, world_size):
    layouts = ranks(num_particles, world_size)
    for particle in range(num_particles):
        owners = {layout.owner(particle) for layout in layouts}
        assert len(owners) == 1  # every rank says the same
        owner = layouts[owners.pop()]
        assert particle in owner.particles
        assert owner.view == 0


@pytest.mark.parametrize(("num_particles", "world_size"), FITTING)
def test_rows_say_what_each_rank_says_of_itself(num_particles, world_size):
    layouts = ranks(num_particles, world_size)
    assert layouts[0].rows() == [(layout.rank, layout.shard, layout.view, layout.particles) for layout in layouts]


def test_seven_particles_on_three_ranks_by_hand():
    assert [list(layout.particles) for layout in ranks(7, 3)] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [Layout.of(7, 3).owner(p) for p in range(7)] == [0, 0, 0, 1, 1, 2, 2]


def test_two_particles_on_six_ranks_by_hand():
    layouts = ranks(2, 6)
    assert [list(layout.particles) for layout in layouts] == [[0], [0], [0], [1], [1], [1]]
    assert [layout.view for layout in layouts] == [0, 1, 2, 0, 1, 2]
    assert [layouts[0].owner(p) for p in range(2)] == [0, 3]


@pytest.mark.parametrize(("num_particles", "world_size"), REFUSED)
def test_a_refusal_names_layouts_that_fit(num_particles, world_size):
    with pytest.raises(ValueError, match=f"{num_particles} particles can't be laid over {world_size} ranks") as refusal:
        Layout.of(num_particles, world_size)
    below, above, fewer_ranks = map(int, re.search(r"--num-particles (\d+) or (\d+), or (\d+) ranks", str(refusal.value)).groups())
    assert below < num_particles < above
    for fitting in ((below, world_size), (above, world_size), (num_particles, fewer_ranks)):
        assert fitting in FITTING


@pytest.mark.parametrize("num_particles", [0, -3])
def test_no_particles_are_refused(num_particles):
    with pytest.raises(ValueError, match=f"at least 1, got {num_particles}"):
        Layout.of(num_particles)
