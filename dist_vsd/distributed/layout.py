"""Which rank owns which particle: the mesh shard x view.

W ranks form ``num_shards`` shards of ``view_ranks`` ranks. Particles are dealt to shards in runs of consecutive ids, evenly or
off by one. Every update renders ``num_views`` views of each particle, in shots: the views that the prior scores together. The ranks of
a shard split the shots, never the views of one. So one particle gains from many ranks too, and what an update computes depends on the
particles and their shots alone, never on the ranks.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shot:
    """What a prior scores together, before it is rendered: the views of one particle that share t and pass through it as one sample.

    Every draw is keyed by the shot, so the ranks divide shots among themselves, never the views of one.

    Attributes:
        particle: its id.
        number: among the shots of the particle in an update.
        num_views: V, the prior's views_per_shot.
    """

    particle: int
    number: int
    num_views: int = 1


@dataclasses.dataclass(frozen=True)
class Layout:
    """The deal of n particles over W ranks, as one rank sees it; made by ``Layout.of``.

    Attributes:
        num_particles: n, over all ranks.
        world_size: W, a multiple of num_shards.
        num_shards: the number of disjoint sets of particles.
        rank: of this process.
        num_views: views of each particle in an update, over all ranks; a multiple of view_ranks * views_per_shot.
        views_per_shot: V, the prior's.
    """

    num_particles: int
    world_size: int
    num_shards: int
    rank: int
    num_views: int
    views_per_shot: int = 1

    @staticmethod
    def of(
        num_particles: int, world_size: int = 1, rank: int = 0, num_views: int = 0, num_shards: int = 0, views_per_shot: int = 1
    ) -> Layout:
        """Lay n particles over W ranks: as many shards as there are particles for, the ranks left over share particles.

        Args:
            num_particles: n.
            world_size: W.
            rank: of this process.
            num_views: of each particle in an update; 0 for a shot of each of the ranks that share it.
            num_shards: 0 for as many as fit.
            views_per_shot: V, the prior's.

        Raises:
            ValueError: a count is out of range, or shards and views do not multiply to W; nearest ones that do are named.
        """
        for name, value, least in (("num_particles", num_particles, 1), ("world_size", world_size, 1), ("num_views", num_views, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}: raise --{name.replace('_', '-')}")
        if num_views % views_per_shot:
            low, high = (num_views // views_per_shot + more for more in (0, 1))
            choices = " or ".join(str(count * views_per_shot) for count in (low, high) if count)
            raise ValueError(f"this prior scores {views_per_shot} views together, got num_views {num_views}: use --num-views {choices}")
        num_shots = num_views // views_per_shot
        if num_shards:
            _check_shards(num_particles, world_size, num_shots, num_shards, views_per_shot)
            num_views = num_views or world_size // num_shards * views_per_shot
            return Layout(num_particles, world_size, num_shards, rank, num_views, views_per_shot)
        fitting = [s for s in _divisors(world_size) if s <= num_particles and _splits(num_shots, world_size // s)]
        if not fitting:
            shares = [world_size // s for s in _divisors(world_size) if s <= num_particles]
            below = [v for v in (num_shots // r * r for r in shares) if v]
            above = [(num_shots // r + 1) * r for r in shares]
            choices = " or ".join(str(count * views_per_shot) for count in [*([max(below)] if below else []), min(above)])
            raise ValueError(
                f"{num_particles} particle(s) with {num_views} view(s) each can't be laid over {world_size} ranks: ranks that "
                f"share a particle must split its views evenly; use --num-views {choices}, or another number of ranks"
            )
        num_views = num_views or world_size // max(fitting) * views_per_shot
        return Layout(num_particles, world_size, max(fitting), rank, num_views, views_per_shot)

    @property
    def view_ranks(self) -> int:
        """Ranks that share each particle."""
        return self.world_size // self.num_shards

    @property
    def shard(self) -> int:
        """Index of this rank's shard; the ranks of a shard are neighbours."""
        return self.rank // self.view_ranks

    @property
    def view_rank(self) -> int:
        """Index of this rank among those of its shard."""
        return self.rank % self.view_ranks

    @property
    def num_shots(self) -> int:
        """Shots of each particle in an update, over all ranks."""
        return self.num_views // self.views_per_shot

    @property
    def shots(self) -> range:
        """Return the shots of its particles that this rank renders in an update."""
        share = self.num_shots // self.view_ranks
        return range(self.view_rank * share, (self.view_rank + 1) * share)

    @property
    def views(self) -> range:
        """Return the views in those shots, counted through."""
        return range(self.shots.start * self.views_per_shot, self.shots.stop * self.views_per_shot)

    @property
    def num_renders(self) -> int:
        """Renders of an update over all ranks."""
        return self.num_particles * self.num_views

    @property
    def max_renders(self) -> int:
        """Renders of an update on the rank that has most."""
        return len(self.particles_of_shard(0)) * len(self.views)

    def particles_of_shard(self, shard: int) -> range:
        """Return the ids of a shard's particles; the first n mod num_shards shards hold one more."""
        share, extra = divmod(self.num_particles, self.num_shards)
        first = shard * share + min(shard, extra)
        return range(first, first + share + (shard < extra))

    @property
    def particles(self) -> range:
        """Return the ids of this rank's particles."""
        return self.particles_of_shard(self.shard)

    def rank_of(self, particle: int, shot: int = 0) -> int:
        """Return the rank that renders a shot of a particle."""
        shard = next(s for s in range(self.num_shards) if particle in self.particles_of_shard(s))
        return shard * self.view_ranks + shot * self.view_ranks // self.num_shots

    def owner(self, particle: int) -> int:
        """Return the rank that writes a particle to disk: the one that renders its first shot."""
        return self.rank_of(particle, 0)

    def rows(self) -> list[Layout]:
        """Return the layout as each rank sees it."""
        return [dataclasses.replace(self, rank=rank) for rank in range(self.world_size)]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _splits(num_shots: int, view_ranks: int) -> bool:
    return num_shots % view_ranks == 0  # 0 shots stand for as many as there are ranks


def _check_shards(num_particles: int, world_size: int, num_shots: int, num_shards: int, views_per_shot: int) -> None:
    possible = [s for s in _divisors(world_size) if s <= num_particles and _splits(num_shots, world_size // s)]
    if num_shards in possible:
        return
    listed = ", ".join(map(str, possible)) or "none"
    if num_shards < 0 or num_shards > num_particles:
        why = f"must be between 1 and the number of particles, {num_particles}"
    elif world_size % num_shards:
        why = f"must divide the number of ranks: shards x ranks a particle do not multiply to {world_size}"
    else:
        why = f"leaves {world_size // num_shards} ranks a particle, which can't split its {num_shots * views_per_shot} view(s) evenly"
    raise ValueError(f"num_shards {why}, got {num_shards}: use --num-shards {listed}")


def ranks_in_words(ranks: list[int]) -> str:
    """Write ranks in words: "rank 3", "ranks 0-6, 8"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    words = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {words}"
