"""The launcher's store: where ranks meet before the process group exists, and agree on what one of them finds wrong.

Whatever a rank finds wrong before the process group exists is told to all the others here, so that all of them end with the same
line and the same exit code, and nobody waits for a rank that has gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import socket

import torch.distributed as dist

from dist_vsd.distributed.layout import ranks_in_words
from dist_vsd.errors import RunFailed

# What torchrun, and so accelerate launch, tells every rank.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# The launchers of all nodes have met before any rank starts, so ranks differ by the time of their imports alone.
JOIN_SECONDS = 300.0


@dataclasses.dataclass(frozen=True)
class StoreAddress:
    """The launcher's store.

    Attributes:
        host, port: of its server.
        attempt: of the launcher, which keeps its store from one to the next.
        is_of_rank_0: whether rank 0 serves it itself, and not the launcher of its node.
    """

    host: str
    port: int
    attempt: str
    is_of_rank_0: bool

    @classmethod
    def of_launcher(cls) -> StoreAddress:
        """Read it from the launcher's variables."""
        is_of_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "") != "True"
        return cls(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), _attempt(), is_of_rank_0)

    @property
    def server(self) -> str:
        """Who serves it, in words."""
        return "rank 0" if self.is_of_rank_0 else "the launcher of node 0"

    def connect(self, seconds: float) -> dist.Store:
        """Open a connection of one's own: a wait in a shared one would make the other users wait."""
        timeout = datetime.timedelta(seconds=seconds)
        store = dist.TCPStore(self.host, self.port, is_master=False, timeout=timeout, wait_for_workers=False)
        return dist.PrefixStore(f"dist_vsd/attempt_{self.attempt}/beat", store)

    def probe(self, seconds: float) -> str:
        """Return "there" if somebody listens, "gone" if the host says that nobody does, "away" if there is no answer at all."""
        try:
            socket.create_connection((self.host, self.port), seconds).close()
        except ConnectionRefusedError:
            return "gone"
        except OSError:
            return "away"
        return "there"


def open_store(refusal: str) -> dist.Store | None:
    """Connect to the launcher's store; None for a process that has no fellows, or can't find them.

    Whoever opens it keeps it until the process group exists: rank 0 may serve it. A launcher with --max_restarts keeps its store
    from one attempt to the next, and with it the addresses of ranks that are gone; so every attempt has keys of its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or (refusal and any(name not in os.environ for name in RANK_VARIABLES)):
        return None
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=JOIN_SECONDS)))
    except dist.DistNetworkError as error:
        raise unreachable() from error
    return dist.PrefixStore(f"dist_vsd/attempt_{_attempt()}", store)


def unreachable() -> RunFailed:
    """Return the failure to find the store."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return RunFailed(f"the launcher's store at {address} can't be reached: see what the launcher of node 0 says")


def _attempt() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def refuse_together(store: dist.Store | None, about: str, refusal: str) -> None:
    """Raise the ValueError of the first rank that refuses on every rank (collective, without a process group).

    Raises:
        ValueError: see above.
        RunFailed: some rank never came.
    """
    refusals = [refusal]
    if store is not None:
        store.set(f"{about}/{os.environ['RANK']}", refusal)
        keys = [f"{about}/{rank}" for rank in range(int(os.environ["WORLD_SIZE"]))]
        try:
            refusals = [value.decode() for value in store.multi_get(keys)]  # waits for all ranks
        except dist.DistStoreError as error:
            missing = ranks_in_words([rank for rank, key in enumerate(keys) if not store.check([key])])
            raise RunFailed(f"{missing} did not come within {store.timeout.total_seconds():.0f} s: see what they said") from error
    found = {rank: text for rank, text in enumerate(refusals) if text}
    if not found:
        return
    if store is not None:
        _wait_until_read(store, about)
    text = next(iter(found.values()))
    same = len(found) == len(refusals)
    raise ValueError(text if same else f"{text} (on {ranks_in_words([r for r, other in found.items() if other == text])})")


def _wait_until_read(store: dist.Store, about: str) -> None:
    """Let rank 0, whose process may serve the store, end after the others have read what it holds."""
    store.set(f"{about}/read/{os.environ['RANK']}", "")
    if os.environ["RANK"] == "0":
        with contextlib.suppress(dist.DistStoreError):  # a rank that died meanwhile
            store.wait([f"{about}/read/{rank}" for rank in range(int(os.environ["WORLD_SIZE"]))], datetime.timedelta(seconds=30))
