"""Every reduction and agreement between ranks. All of them work on one process too, where they change nothing.

Each function is a collective: every rank (of the group that it names) must reach it, in the same order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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


class Collectives:
    """The collectives of one run, over the mesh shard x view of its layout.

    Args:
        layout: of the run; with num_views > 1 a process group for each shard's ranks is made (collective).
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._view_group = None
        if is_distributed() and layout.num_views > 1:
            mesh = dist.init_device_mesh(
                _device().type, (layout.num_shards, layout.num_views), mesh_dim_names=("shard", "view")
            )
            self._view_group = mesh.get_group("view")

    def sum_over_ranks(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all ranks, in one message.

        Args:
            tensors: of any shapes, the same on every rank; changed in place.
        """
        self._sum(tensors, None, 1.0)

    def mean_over_views(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the ranks that share a particle, in one message."""
        if self.layout.num_views > 1:
            self._sum(tensors, self._view_group, 1.0 / self.layout.num_views)

    @staticmethod
    def _sum(tensors: Sequence[Tensor], group: Any, factor: float) -> None:
        if not is_distributed() or not tensors:
            return
        flat = torch.cat([t.reshape(-1).float() for t in tensors])
        dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=group)
        for tensor, total in zip(tensors, (flat * factor).split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def sum_of(self, value: float) -> float:
        """Return the sum of a number over all ranks."""
        total = torch.tensor([value], dtype=torch.float64)
        return float(self._reduced(total, dist.ReduceOp.SUM))

    def all_true(self, flag: bool) -> bool:
        """Return whether the flag holds on every rank."""
        return float(self._reduced(torch.tensor([float(flag)]), dist.ReduceOp.MIN)) == 1.0

    def any_true(self, flag: bool) -> bool:
        """Return whether the flag holds on some rank."""
        return not self.all_true(not flag)

    @staticmethod
    def _reduced(value: Tensor, operation: Any) -> Tensor:
        if is_distributed():
            value = value.to(_device())
            dist.all_reduce(value, op=operation)
        return value.cpu()

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
