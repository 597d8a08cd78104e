"""What an update costs on many ranks: closed forms of counts, bytes and seconds. Nothing here runs a network or reads a file.

    update = render + scores + backward + phi + other         fixed seconds, and those of a render times an average rank's renders
           + imbalance                                        what the fullest rank takes longer
           + theta's reduction over the ranks of a particle   as if nothing hid it
           + phi's reduction over all ranks                   less what ``overlap`` hides
           + agreement                                        small messages: the flags to stop or skip, phi's loss

Assumptions. Seconds of a stage grow linearly with the renders; without two measurements on one rank, in proportion to them.
Ranks are alike and start together: no stragglers. Reductions are rings, inside a node and then between nodes, and one thing at a
time uses a link, but for the particles that reduce theta over the same link at the same time. The fp32 gradients travel whole.
Not counted: start, checkpoints, previews, comparisons of phi, the deterministic mode, ZeRO's gathers of weights.
Units: seconds, bytes, bytes a second.
"""

from __future__ import annotations

import collections
import dataclasses
import math

from dist_vsd.distributed.layout import Layout

NUMBER_BYTES = 4  # fp32: theta, phi and their gradients
STATE_NUMBERS = 4  # of each trained number: itself, its gradient, two Adam moments
AGREEMENT_BYTES, AGREEMENTS = 8, 2  # messages of an update beside the gradients


@dataclasses.dataclass(frozen=True)
class Peak:
    """The most memory that an update holds.

    Attributes:
        num_bytes: then.
        stage: of the update in which that is.
    """

    num_bytes: int
    stage: str


@dataclasses.dataclass(frozen=True)
class Link:
    """A connection.

    Attributes:
        bandwidth: payload in one direction, bytes a second; may be infinite.
        latency: of one message, seconds.
    """

    bandwidth: float
    latency: float

    @staticmethod
    def of(gbit: float, latency_us: float) -> Link:
        """Return a link of so many Gbit/s and microseconds."""
        return Link(gbit * 1e9 / 8, latency_us * 1e-6)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs, a rank each.

    Attributes:
        num_nodes: N.
        gpus_per_node: G.
        inside: between two GPUs of a node; each GPU has its own.
        between: of a node to the others; the node's GPUs share it.
    """

    num_nodes: int
    gpus_per_node: int
    inside: Link
    between: Link

    @property
    def num_ranks(self) -> int:
        """W."""
        return self.num_nodes * self.gpus_per_node


@dataclasses.dataclass(frozen=True)
class StageSeconds:
    """Seconds in each stage of an update (training/update.py), of one render or of what does not grow with the renders.

    Attributes:
        render, scores, backward: see there.
        phi: of one of phi's steps, without its reduction.
        other: outside of the stages: norms, moving particles.
    """

    render: float
    scores: float
    backward: float
    phi: float
    other: float = 0.0


NOTHING = StageSeconds(0.0, 0.0, 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a rank holds.

    Attributes:
        theta_numbers: of one particle.
        phi_numbers: trained numbers of eps_phi; 0 for an objective without it.
        prior_bytes: of the frozen networks, or None if not known.
        render_bytes: that a render of a micro-batch holds while it passes through the networks, or None if not known.
    """

    theta_numbers: int
    phi_numbers: int
    prior_bytes: float | None
    render_bytes: float | None


@dataclasses.dataclass(frozen=True)
class Span:
    """How a group of ranks lies over the nodes.

    Attributes:
        ranks_per_node: ranks of the group in one node.
        num_nodes: that it touches.
        sharing: groups of its kind that use the same node's link at the same time.
    """

    ranks_per_node: int
    num_nodes: int
    sharing: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateCost:
    """Seconds of one update by part, and bytes.

    Attributes:
        layout: of the particles, as rank 0 sees it.
        cluster: that it lies on.
        render, scores, backward, phi, other: compute of a rank with the average number of renders.
        imbalance: what the rank with most particles computes longer than that.
        theta_reduction: over the ranks that share a particle.
        phi_reduction: over all ranks, of all phi's steps, without what is hidden.
        phi_reduction_hidden: behind phi's own backward pass.
        agreement: small messages.
        rank_sent_bytes: payload that a rank sends, in rings.
        node_sent_bytes: payload that leaves a node.
    """

    layout: Layout
    cluster: Cluster
    render: float
    scores: float
    backward: float
    phi: float
    other: float
    imbalance: float
    theta_reduction: float
    phi_reduction: float
    phi_reduction_hidden: float
    agreement: float
    rank_sent_bytes: float
    node_sent_bytes: float

    @property
    def compute(self) -> float:
        """Seconds of a rank with the average number of renders, alone: the same update on one rank."""
        return self.render + self.scores + self.backward + self.phi + self.other

    @property
    def communication(self) -> float:
        """Seconds in which ranks wait for messages."""
        return self.theta_reduction + self.phi_reduction + self.agreement

    @property
    def seconds(self) -> float:
        """Seconds of the update."""
        return self.compute + self.imbalance + self.communication

    @property
    def efficiency(self) -> float:
        """The same update on one rank, with as many renders as a rank has on average, over this one; at most 1."""
        return self.compute / self.seconds if self.seconds else 1.0

    @property
    def communication_share(self) -> float:
        """Share of the update that is communication."""
        return self.communication / self.seconds if self.seconds else 0.0


def ring_sent_bytes(num_bytes: float, num_ranks: int) -> float:
    """Return what each rank sends in a ring all-reduce: 2 (W - 1) / W of the message (Patarasuk and Yuan 2009, section 3).

    Args:
        num_bytes: of the message.
        num_ranks: W.
    """
    return 2 * (num_ranks - 1) / num_ranks * num_bytes


def ring_all_reduce_seconds(num_bytes: float, num_ranks: int, link: Link) -> float:
    """Return the time of a ring all-reduce, 2 (W - 1) / W bytes / bandwidth + 2 (W - 1) latency (Patarasuk and Yuan 2009).

    Args:
        num_bytes: of the message.
        num_ranks: W.
        link: between neighbours.
    """
    return ring_sent_bytes(num_bytes, num_ranks) / link.bandwidth + 2 * (num_ranks - 1) * link.latency


def all_reduce_seconds(num_bytes: float, span: Span, cluster: Cluster) -> float:
    """Return the time of an all-reduce in two floors: reduce-scatter and all-gather inside each node, all-reduce between nodes.

    Each GPU of a node reduces its own part with its fellows of the other nodes. The parts share the node's one link, so together
    they take what one ring of the whole message over the nodes would take.

    Args:
        num_bytes: of the message.
        span: of the group over the nodes.
        cluster: its links.
    """
    inside = ring_all_reduce_seconds(num_bytes, span.ranks_per_node, cluster.inside)
    between = ring_all_reduce_seconds(num_bytes * span.sharing, span.num_nodes, cluster.between)
    return inside + between


def span_of_neighbours(group_size: int, gpus_per_node: int) -> Span:
    """Return how groups of neighbouring ranks lie over the nodes; for uneven ones, how the worst of them lies.

    Args:
        group_size: ranks of each group; groups follow one another, rank 0 begins the first.
        gpus_per_node: G.
    """
    period = math.lcm(group_size, gpus_per_node)
    touched = [
        range(first // gpus_per_node, (first + group_size - 1) // gpus_per_node + 1) for first in range(0, period, group_size)
    ]
    crossing = collections.Counter(node for nodes in touched if len(nodes) > 1 for node in nodes)
    return Span(min(group_size, gpus_per_node), max(map(len, touched)), max(crossing.values(), default=1))


def hidden_seconds(reduction: float, overlap: float, window: float) -> float:
    """Return the part of a reduction that runs behind compute: the share ``overlap`` of it, at most the compute's own time.

    Args:
        reduction: its whole time.
        overlap: share of it that could run while the gradients are still being made, 0..1.
        window: the compute that it can hide behind.
    """
    return min(overlap * reduction, window)


def average_renders(layout: Layout) -> float:
    """Return the renders of an update on a rank, averaged over ranks: n V / W."""
    return layout.num_particles * layout.num_views / layout.world_size


def most_particles(layout: Layout) -> int:
    """Return the particles of the fullest rank: ceil(n / num_shards)."""
    return -(-layout.num_particles // layout.num_shards)


def most_renders(layout: Layout) -> int:
    """Return the renders of an update on the fullest rank: ceil(n / num_shards) V / view_ranks."""
    return most_particles(layout) * layout.num_views // layout.view_ranks


def render_seconds(stages: StageSeconds, num_phi_steps: int) -> float:
    """Return the compute of one render in all stages of an update."""
    return stages.render + stages.scores + stages.backward + num_phi_steps * stages.phi + stages.other


def update_cost(
    layout: Layout,
    cluster: Cluster,
    stages: StageSeconds,
    sizes: Sizes,
    num_phi_steps: int = 1,
    overlap: float = 0.0,
    fixed: StageSeconds = NOTHING,
) -> UpdateCost:
    """Return what one update costs.

    Args:
        layout: of the particles over the cluster's ranks.
        cluster: nodes and links.
        stages: seconds of one render.
        sizes: of theta and phi.
        num_phi_steps: of phi in an update, each with a reduction.
        overlap: share of phi's reduction that can run during the phi step that makes it, 0..1.
        fixed: seconds of an update whatever the number of renders.
    """
    assert layout.world_size == cluster.num_ranks, (layout, cluster)
    average, most, particles = average_renders(layout), most_renders(layout), most_particles(layout)
    everyone = span_of_neighbours(cluster.num_ranks, cluster.gpus_per_node)
    fellows = span_of_neighbours(layout.view_ranks, cluster.gpus_per_node)
    theta_bytes, phi_bytes = NUMBER_BYTES * sizes.theta_numbers, NUMBER_BYTES * sizes.phi_numbers
    phi_reduction = all_reduce_seconds(phi_bytes, everyone, cluster) if phi_bytes else 0.0
    phi_step = fixed.phi + stages.phi * average
    hidden = hidden_seconds(phi_reduction, overlap, phi_step)
    sent_by_node = num_phi_steps * ring_sent_bytes(phi_bytes, everyone.num_nodes)
    sent_by_node += particles * ring_sent_bytes(theta_bytes * fellows.sharing, fellows.num_nodes)
    sent_by_rank = num_phi_steps * ring_sent_bytes(phi_bytes, layout.world_size)
    return UpdateCost(
        layout=layout,
        cluster=cluster,
        render=fixed.render + stages.render * average,
        scores=fixed.scores + stages.scores * average,
        backward=fixed.backward + stages.backward * average,
        phi=phi_step * num_phi_steps,
        other=fixed.other + stages.other * average,
        imbalance=(most - average) * render_seconds(stages, num_phi_steps),
        theta_reduction=particles * all_reduce_seconds(theta_bytes, fellows, cluster),
        phi_reduction=num_phi_steps * (phi_reduction - hidden),
        phi_reduction_hidden=num_phi_steps * hidden,
        agreement=AGREEMENTS * all_reduce_seconds(AGREEMENT_BYTES, everyone, cluster),
        rank_sent_bytes=sent_by_rank + particles * ring_sent_bytes(theta_bytes, layout.view_ranks),
        node_sent_bytes=sent_by_node,
    )


def rank_memory_bytes(layout: Layout, sizes: Sizes, micro_batch_size: int, offload: bool = False) -> dict[str, float | None]:
    """Return what the fullest rank holds, by what holds it; None where it is not known.

    Theta and phi with a gradient and two Adam moments each, fp32. With offload, two micro-batches of particles are on the device
    (particles/placement.py), else all of the rank's.

    Args:
        layout: of the particles.
        sizes: of theta, phi and the frozen networks.
        micro_batch_size: renders that pass through the networks together.
        offload: whether idle particles wait in host memory.
    """
    particles = most_particles(layout)
    resident = min(particles, 2 * micro_batch_size) if offload else particles
    together = min(micro_batch_size, most_renders(layout))
    return {
        "prior": sizes.prior_bytes,
        "theta": float(STATE_NUMBERS * NUMBER_BYTES * sizes.theta_numbers * resident),
        "phi": float(STATE_NUMBERS * NUMBER_BYTES * sizes.phi_numbers),
        "activations": None if sizes.render_bytes is None else sizes.render_bytes * together,
    }


def node_hours(num_nodes: int, seconds_per_update: float, num_updates: int, num_prompts: int) -> float:
    """Return the node-hours of prompts that run one after another on all nodes."""
    return num_nodes * seconds_per_update * num_updates * num_prompts / 3600
