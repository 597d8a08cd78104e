"""Every reduction and agreement between ranks. All of them work on one process too, where they change nothing.

Each function is a collective: every rank (of the group that it names) must reach it, in the same order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_vsd.device import synchronize
from dist_vsd.distributed.heartbeat import GO_ON, RankLost, current_heartbeat
from dist_vsd.distributed.layout import Layout
from dist_vsd.errors import RunFailed


class RanksDisagree(RunFailed):
    """Ranks hold different values of something that must be the same on all; the message names them."""


def is_distributed() -> bool:
    """Say whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device() -> torch.device:
    """Return the device that the default group's collectives want their tensors on."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _now() -> float:
    """Return the time at which all that was asked of this rank's device is done."""
    synchronize(_device())
    return time.perf_counter()


# What gloo, NCCL and torch say when a peer is gone: they have no exception of their own for it.
_SIGNS_OF_A_LOST_RANK = ("connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "gloo", "nccl")


@contextlib.contextmanager
def naming_lost_ranks(doing: str) -> Iterator[None]:
    """Turn a backend's error about a dead peer inside the ``with`` into RankLost, with the name of the rank that is lost.

    Args:
        doing: what was being done, for the message.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, RunFailed) or not any(sign in text.lower() for sign in _SIGNS_OF_A_LOST_RANK):
            raise
        heartbeat = current_heartbeat()
        lost = heartbeat.name_lost() if heartbeat is not None else ""
        reason = " ".join(text.split())[:200]
        named = lost or "another rank died or can't be reached"
        raise RankLost(f"{named} ({doing}: {reason}). Its own output may say why. {GO_ON}", lost) from error


class Collectives:
    """The collectives of one run, over the mesh shard x view of its layout.

    Args:
        layout: of the run; where ranks share particles, a process group for each shard's ranks is made (collective).

    Attributes:
        sent_bytes: payload of the reductions that this rank has sent so far; of an all-reduce in a ring over G ranks each
            sends 2 (G - 1) / G of its length.
        is_timed: whether the time in collectives is measured (on a GPU that takes CPU-GPU syncs).
        waited_seconds: that this rank has spent in the collectives of an update, or waiting in them for other ranks.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.sent_bytes = self.waited_seconds = 0.0
        self.is_timed = False
        self._view_group = None
        if is_distributed() and layout.view_ranks > 1:
            mesh = dist.init_device_mesh(
                _device().type, (layout.num_shards, layout.view_ranks), mesh_dim_names=("shard", "view")
            )
            self._view_group = mesh.get_group("view")

    def sum_over_ranks(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all ranks, in one message.

        Args:
            tensors: of any shapes, the same on every rank; changed in place.
        """
        if not is_distributed() or not tensors:
            return
        flat = torch.cat([t.reshape(-1).float() for t in tensors])
        with self._timed():
            dist.all_reduce(flat, op=dist.ReduceOp.SUM)
        self.count_all_reduce(4 * flat.numel(), self.layout.world_size)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def begin_sum_over_views(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin to add tensors up over the ranks that share a particle, in one message; the rank goes on meanwhile.

        Args:
            tensors: of any shapes, the same on each of these ranks; their own memory is not needed until the sums are there.

        Returns:
            A function that waits and returns the sums, fp32: on a GPU its stream waits, not the host. All of the ranks call it in the
            order in which they began.
        """
        if not is_distributed() or self.layout.view_ranks == 1 or not tensors:
            return lambda: list(tensors)
        shapes = [t.shape for t in tensors]
        flat = torch.cat([t.reshape(-1).float() for t in tensors])
        pending = dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=self._view_group, async_op=True)
        self.count_all_reduce(4 * flat.numel(), self.layout.view_ranks)

        def wait() -> list[Tensor]:
            with self._timed():
                pending.wait()
            return [part.view(shape) for part, shape in zip(flat.split([shape.numel() for shape in shapes]), shapes, strict=True)]

        return wait

    def count_all_reduce(self, num_bytes: int, group_size: int) -> None:
        """Add an all-reduce in a ring to sent_bytes; for reductions that a library does."""
        self.sent_bytes += 2 * (group_size - 1) / group_size * num_bytes

    def begin_update(self, is_timed: bool) -> None:
        """Start counting and timing anew: what goes before is not of the update."""
        self.sent_bytes = self.waited_seconds = 0.0
        self.is_timed = is_timed

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Add the time inside the ``with`` to waited_seconds."""
        if not self.is_timed or not is_distributed():
            yield
            return
        begin = _now()
        yield
        self.waited_seconds += _now() - begin

    def sum_in_order(
        self, rows: Mapping[tuple[int, int], Sequence[Tensor]], order: Sequence[tuple[int, int]], over: str, like: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return sums whose bits do not depend on the layout: row after row, in a given order.

        Every row travels by itself, so this sends as many messages as there are rows: for the deterministic mode.

        Args:
            rows: of this rank, by (particle, shot): tensors shaped like ``like`` in every row; may be empty.
            order: of all rows of the group.
            over: "ranks", or "views" for the ranks that share a particle.
            like: tensors of a row's shapes, on this rank's device.

        Returns:
            fp32 tensors shaped like those of a row, the same bits on every rank of the group.
        """
        shapes = [t.shape for t in like]
        sizes = [shape.numel() for shape in shapes]
        total = torch.zeros(sum(sizes), device=like[0].device)
        alone = not is_distributed() or (over == "views" and self.layout.view_ranks == 1)
        for row in order:
            if row in rows:
                flat = torch.cat([t.reshape(-1).float() for t in rows[row]])
                self.sent_bytes += 0.0 if alone else 4 * flat.numel()
            else:
                flat = torch.empty_like(total)
            if not alone:
                with self._timed():
                    dist.broadcast(flat, self.layout.rank_of(*row), group=self._view_group if over == "views" else None)
            total += flat
        return [part.view(shape) for part, shape in zip(total.split(sizes), shapes, strict=True)]

    def any_of(self, flags: Sequence[bool | Tensor]) -> list[bool]:
        """Return, for each of some flags, whether it holds on some rank; in one message.

        Args:
            flags: of the host, or () tensors of its device (a CPU-GPU sync, the only one).
        """
        device = next((flag.device for flag in flags if isinstance(flag, Tensor)), torch.device("cpu"))
        numbers = [torch.full((), float(flag), device=device) if not isinstance(flag, Tensor) else flag.float() for flag in flags]
        with self._timed():
            tensor = torch.stack(numbers)
            if is_distributed():
                tensor = tensor.to(_device())
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
            return [value > 0 for value in tensor.tolist()]

    def gather_json(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order, on all ranks.

        Args:
            value: anything that JSON can hold. It travels as JSON text: nothing is pickled.
        """
        if not is_distributed():
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_device())
        lengths = [torch.zeros(1, dtype=torch.int64, device=_device()) for _ in range(self.layout.world_size)]
        dist.all_gather(lengths, torch.tensor([text.numel()], device=_device()))
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8, device=_device())
        padded[: text.numel()] = text
        gathered = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(gathered, padded)
        pairs = zip(gathered, lengths, strict=True)
        return [json.loads(bytes(row[: int(length)].cpu().numpy())) for row, length in pairs]

    def from_first_view_rank(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Return the named tensors that the first of the ranks that share a particle has, of whatever shapes, on all of them.

        Args:
            tensors: on the first one; None on the others.
        """
        if not is_distributed() or self.layout.view_ranks == 1:
            return dict(tensors or {})
        first = self.layout.shard * self.layout.view_ranks
        is_first = self.layout.rank == first
        header = b""
        if is_first:
            assert tensors is not None
            rows = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()]
            header = json.dumps(rows).encode()
        length = torch.tensor([len(header)], device=_device())
        dist.broadcast(length, first, group=self._view_group)
        text = torch.zeros(int(length), dtype=torch.uint8, device=_device())
        if is_first:
            text.copy_(torch.frombuffer(bytearray(header), dtype=torch.uint8))
        dist.broadcast(text, first, group=self._view_group)
        rows = json.loads(bytes(text.cpu().numpy()))
        received: dict[str, Tensor] = {}
        for name, shape, dtype in rows:
            source = tensors[name].detach().to(_device()).contiguous() if is_first and tensors is not None else None
            tensor = source if source is not None else torch.empty(shape, dtype=getattr(torch, dtype), device=_device())
            dist.broadcast(tensor.reshape(-1).view(torch.uint8), first, group=self._view_group)
            received[name] = tensor
        self.sent_bytes += sum(t.numel() * t.element_size() for t in received.values()) if is_first else 0.0
        return received

    def barrier(self) -> None:
        """Wait for all ranks."""
        if is_distributed():
            dist.barrier()

    def require_identical(self, what: str, tensors: Iterable[Tensor]) -> None:
        """Check that tensors are the same, to the bit, on all ranks.

        Raises:
            RanksDisagree: on every rank, naming the ranks that differ from rank 0.
        """
        self.require_equal(what, fingerprint(tensors))

    def require_same_particles(self, what: str, particles: Mapping[int, Iterable[Tensor]]) -> None:
        """Check that each particle is the same, to the bit, on the ranks that share it.

        Args:
            what: is compared, for the message.
            particles: the tensors of this rank's, by id.

        Raises:
            RanksDisagree: on every rank, naming a particle and the ranks that differ from the first that has it.
        """
        if self.layout.view_ranks == 1:
            return
        rows = self.gather_json({str(particle): fingerprint(tensors) for particle, tensors in particles.items()})
        for particle in dict.fromkeys(name for row in rows for name in row):
            owners = {rank: row[particle] for rank, row in enumerate(rows) if particle in row}
            first = min(owners)
            if different := [rank for rank, value in owners.items() if value != owners[first]]:
                ranks = ", ".join(map(str, different))
                raise RanksDisagree(
                    f"particle {particle} {what} differs between the ranks that share it: rank(s) {ranks} from rank {first}. "
                    "Resume from the last checkpoint"
                )

    def require_equal(self, what: str, value: Any) -> None:
        """Check that a JSON value is the same on all ranks; raises RanksDisagree on every rank otherwise."""
        values = self.gather_json(value)
        different = [rank for rank, other in enumerate(values) if other != values[0]]
        if different:
            ranks = ", ".join(map(str, different))
            raise RanksDisagree(f"{what} differs between ranks: rank(s) {ranks} from rank 0. Resume from the last checkpoint")


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return a hash of the tensors' bits."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
