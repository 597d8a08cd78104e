"""Which rank owns which particle: the mesh shard x view.

W ranks form ``num_shards`` shards of ``num_views`` ranks. Particles are dealt to shards in runs of consecutive ids, evenly or
off by one. With fewer particles than ranks, the ranks of a shard render different views of the same particle.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Layout:
    """The deal of n particles over W ranks, as one rank sees it.

    Attributes:
        num_particles: n, over all ranks.
        world_size: W, a multiple of num_shards.
        num_shards: the number of disjoint sets of particles.
        rank: of this process.
    """

    num_particles: int
    world_size: int
    num_shards: int
    rank: int

    @staticmethod
    def of(num_particles: int, world_size: int = 1, rank: int = 0) -> Layout:
        """Lay n particles over W ranks: a rank each, or several ranks a particle where there are fewer particles.

        Raises:
            ValueError: n < 1, or n < W does not divide W.
        """
        if num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, got {num_particles}: raise --num-particles")
        num_shards = min(num_particles, world_size)
        if world_size % num_shards:
            fitting = [n for n in range(1, world_size + 1) if world_size % n == 0]
            below = max(n for n in fitting if n < num_particles)
            above = min(n for n in fitting if n > num_particles)
            raise ValueError(
                f"{num_particles} particles can't be laid over {world_size} ranks evenly in views: "
                f"use --num-particles {below} or {above}, or {num_particles} ranks"
            )
        return Layout(num_particles, world_size, num_shards, rank)

    @property
    def num_views(self) -> int:
        """Ranks that share each particle; each renders a view of its own."""
        return self.world_size // self.num_shards

    @property
    def shard(self) -> int:
        """Index of this rank's shard; the ranks of a shard are neighbours."""
        return self.rank // self.num_views

    @property
    def view(self) -> int:
        """Index of this rank among those of its shard."""
        return self.rank % self.num_views

    def particles_of_shard(self, shard: int) -> range:
        """Return the ids of a shard's particles; the first n mod num_shards shards hold one more."""
        share, extra = divmod(self.num_particles, self.num_shards)
        first = shard * share + min(shard, extra)
        return range(first, first + share + (shard < extra))

    @property
    def particles(self) -> range:
        """Return the ids of this rank's particles."""
        return self.particles_of_shard(self.shard)

    def owner(self, particle: int) -> int:
        """Return the rank that writes a particle to disk: view 0 of its shard."""
        shards = range(self.num_shards)
        return next(s for s in shards if particle in self.particles_of_shard(s)) * self.num_views

    def rows(self) -> list[tuple[int, int, int, range]]:
        """Return (rank, shard, view, particle ids) of every rank."""
        views = self.num_views
        return [(r, r // views, r % views, self.particles_of_shard(r // views)) for r in range(self.world_size)]
