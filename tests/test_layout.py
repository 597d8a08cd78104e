"""distributed/layout.py: every deal of up to 9 particles over up to 12 ranks, with every number of views and shards."""

import itertools
import re

import pytest

from dist_vsd.distributed.layout import Layout

PAIRS = list(itertools.product(range(1, 10), range(1, 13)))


def laid(num_particles, world_size, **options):
    """Return the layout as each rank sees it, or None where it is refused."""
    try:
        return [Layout.of(num_particles, world_size, rank, **options) for rank in range(world_size)]
    except ValueError:
        return None


# All that can be laid out: with views and shards chosen by the layout, or given.
GIVEN = [{"num_views": v, "num_shards": s} for v in range(7) for s in range(5)]
LAYOUTS = [ranks for (n, w), options in itertools.product(PAIRS, GIVEN) if (ranks := laid(n, w, **options))]


def test_any_number_of_particles_can_be_laid_over_any_number_of_ranks():
    assert all(laid(*pair) for pair in PAIRS)
    assert len(LAYOUTS) > len(PAIRS)


def test_every_view_of_every_particle_is_rendered_by_exactly_one_rank_and_all_render_something():
    for ranks in LAYOUTS:
        rendered = sorted((particle, view) for layout in ranks for particle in layout.particles for view in layout.views)
        assert rendered == list(itertools.product(range(ranks[0].num_particles), range(ranks[0].num_views)))
        counts = [len(layout.particles) * len(layout.views) for layout in ranks]
        assert max(counts) == ranks[0].max_renders
        assert min(counts) >= 1
        assert ranks[0].num_renders == len(rendered)


def test_shards_differ_by_at_most_one_particle_and_multiply_with_their_ranks_to_the_world():
    for ranks in LAYOUTS:
        first = ranks[0]
        sizes = [len(first.particles_of_shard(s)) for s in range(first.num_shards)]
        assert max(sizes) - min(sizes) <= 1
        assert first.num_shards * first.view_ranks == first.world_size
        assert [(layout.shard, layout.view_rank) for layout in ranks] == list(
            itertools.product(range(first.num_shards), range(first.view_ranks))
        )


def test_rank_of_names_the_rank_that_renders_and_the_owner_renders_view_0():
    for ranks in LAYOUTS:
        for layout, particle in itertools.product(ranks, range(ranks[0].num_particles)):
            for view in range(layout.num_views):
                renderer = ranks[layout.rank_of(particle, view)]
                assert particle in renderer.particles
                assert view in renderer.views
            assert 0 in ranks[layout.owner(particle)].views


def test_rows_say_what_each_rank_says_of_itself():
    assert all(ranks[-1].rows() == ranks for ranks in LAYOUTS)


def test_seven_particles_on_three_ranks_by_hand():
    ranks = laid(7, 3)
    assert [list(layout.particles) for layout in ranks] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [ranks[0].owner(p) for p in range(7)] == [0, 0, 0, 1, 1, 2, 2]


def test_one_particle_on_four_ranks_is_seen_four_times():
    assert [(list(layout.particles), list(layout.views)) for layout in laid(1, 4)] == [([0], [0]), ([0], [1]), ([0], [2]), ([0], [3])]


def test_three_particles_on_eight_ranks_by_hand():
    ranks = laid(3, 8)
    assert [list(layout.particles) for layout in ranks] == [[0, 1]] * 4 + [[2]] * 4
    assert [list(layout.views) for layout in ranks] == [[0], [1], [2], [3]] * 2


def test_four_particles_with_two_views_by_hand():
    dealt = [(list(layout.particles), list(layout.views)) for layout in laid(4, 4, num_views=2)]
    assert dealt == [([0], [0, 1]), ([1], [0, 1]), ([2], [0, 1]), ([3], [0, 1])]
    dealt = [(list(layout.particles), list(layout.views)) for layout in laid(4, 4, num_views=2, num_shards=2)]
    assert dealt == [([0, 1], [0]), ([0, 1], [1]), ([2, 3], [0]), ([2, 3], [1])]


def test_a_refusal_names_the_nearest_layouts_and_they_can_be_laid():
    refused = [(n, w, v) for (n, w), v in itertools.product(PAIRS, range(1, 7)) if laid(n, w, num_views=v) is None]
    assert (1, 4, 3) in refused
    for num_particles, world_size, num_views in refused:
        with pytest.raises(ValueError, match=f"{num_particles} particle.* can't be laid over {world_size} ranks") as refusal:
            Layout.of(num_particles, world_size, num_views=num_views)
        named = [int(v) for v in re.findall(r"\d+", re.search(r"--num-views ([\d or]+),", str(refusal.value)).group(1))]
        assert named
        assert all(laid(num_particles, world_size, num_views=v) for v in named)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_shards": 3}, "shards x ranks a particle do not multiply to 8, got 3: use --num-shards 1, 2, 4"),
        ({"num_shards": 8}, "must be between 1 and the number of particles, 4, got 8"),
        ({"num_shards": -2}, "must be between 1 and the number of particles, 4, got -2"),
        ({"num_shards": 2, "num_views": 3}, "leaves 4 ranks a particle, which can't split its 3 view.s. evenly, got 2"),
        ({"num_views": -1}, "num_views must be at least 0, got -1: raise --num-views"),
    ],
)
def test_shards_and_views_that_do_not_fit_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Layout.of(4, 8, **options)


@pytest.mark.parametrize("num_particles", [0, -3])
def test_no_particles_are_refused(num_particles):
    with pytest.raises(ValueError, match=f"at least 1, got {num_particles}: raise --num-particles"):
        Layout.of(num_particles)
