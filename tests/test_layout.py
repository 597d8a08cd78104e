"""distributed/layout.py: every deal of up to 12 particles over up to 12 ranks."""

import re

import pytest

from dist_vsd.distributed.layout import Layout

PAIRS = [(n, w) for n in range(1, 13) for w in range(1, 13)]
FITTING = [(n, w) for n, w in PAIRS if n >= w or w % n == 0]
REFUSED = [pair for pair in PAIRS if pair not in FITTING]


def ranks(num_particles, world_size):
    return [Layout.of(num_particles, world_size, rank) for rank in range(world_size)]


def test_every_particle_is_owned_exactly_once_and_shards_differ_by_at_most_one():
    for num_particles, world_size in FITTING:
        shards = {layout.shard: list(layout.particles) for layout in ranks(num_particles, world_size)}
        assert sum((shards[s] for s in sorted(shards)), []) == list(range(num_particles)), (num_particles, world_size)
        sizes = [len(particles) for particles in shards.values()]
        assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1, (num_particles, world_size)
        assert len(shards) == min(num_particles, world_size)


def test_each_shard_has_one_rank_for_each_view():
    for num_particles, world_size in FITTING:
        layouts = ranks(num_particles, world_size)
        num_views = max(1, world_size // num_particles)
        seen = [(layout.shard, layout.view) for layout in layouts]
        assert seen == [(shard, view) for shard in range(world_size // num_views) for view in range(num_views)]
        assert {layout.num_views for layout in layouts} == {num_views}


def test_the_owner_of_a_particle_is_view_0_of_the_shard_that_holds_it():
    for num_particles, world_size in FITTING:
        layouts = ranks(num_particles, world_size)
        for particle in range(num_particles):
            (owner,) = {layout.owner(particle) for layout in layouts}  # every rank says the same
            assert particle in layouts[owner].particles
            assert layouts[owner].view == 0


def test_rows_say_what_each_rank_says_of_itself():
    for num_particles, world_size in FITTING:
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


def test_a_refusal_names_layouts_that_fit():
    assert len(REFUSED) == 66 - sum(world_size % n == 0 for world_size in range(1, 13) for n in range(1, world_size))
    for num_particles, world_size in REFUSED:
        with pytest.raises(ValueError, match=f"{num_particles} particles can't be laid over {world_size} ranks") as refusal:
            Layout.of(num_particles, world_size)
        below, above, fewer_ranks = map(int, re.search(r"--num-particles (\d+) or (\d+), or (\d+) ranks", str(refusal.value)).groups())
        assert below < num_particles < above
        assert {(below, world_size), (above, world_size), (num_particles, fewer_ranks)} <= set(FITTING)


@pytest.mark.parametrize("num_particles", [0, -3])
def test_no_particles_are_refused(num_particles):
    with pytest.raises(ValueError, match=f"at least 1, got {num_particles}"):
        Layout.of(num_particles)
