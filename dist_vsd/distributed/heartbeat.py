"""Signs of life: every rank beats in the launcher's store and watches the others, so that a lost rank is named on all nodes.

A backend alone does not tell: gloo notices a closed connection but not a rank that hangs, and NCCL waits for its timeout of ten
minutes and then aborts the process. Here two threads of each rank work beside the main one, which may hang in a collective:

    beating    puts a number that grows into the store and reads those of all ranks; it may hang with the store. Rank 0 reads them
               and puts them together for the others: if all W read W numbers, 2048 ranks would keep ten stores busy
    watching   counts for how long it has seen no rank's number change; it never touches the store, and ends the process

Clocks of hosts are never compared, and a watcher counts only the time in which it was running itself: after all ranks were
stopped and go on, nobody is lost. A rank that ends says so in the store, in the place of its number.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from dist_vsd.distributed.layout import ranks_in_words
from dist_vsd.distributed.store import StoreAddress
from dist_vsd.errors import RunFailed

# A rank beats in a thread, which only waits where the main thread keeps Python's lock: writing checkpoints, hashing and torch's
# operations let go of it (the longest wait seen while 1 GiB was written for 7 s: 0.05 s), loading libraries keeps it for seconds.
# Half a minute is well beyond those and leaves as much again, within a minute, to tell of the loss.
LOST_AFTER_SECONDS = 30.0
VARIABLE = "DIST_VSD_LOST_AFTER_SECONDS"
BEATS_TO_LOSS = 10
BEATS_TO_SUSPECT = 3  # where a collective has failed already: there is a loss, only its name is wanted
GO_ON = "Finished checkpoints are whole: go on with the same command and --resume"
_ALL = "all"
_LEFT, _FAILED, _LOST = "left", "failed: ", "lost: "


class RankLost(RunFailed):
    """A collective failed because a rank died or can no longer be reached.

    Args:
        message: what the user is told.
        lost: which rank and how one knows, in words; empty if that could not be found out.
    """

    def __init__(self, message: str, lost: str = "") -> None:
        super().__init__(message)
        self.lost = lost


def lost_after_seconds() -> float:
    """Return for how long a rank may be silent; ValueError if DIST_VSD_LOST_AFTER_SECONDS is no number of at least 1."""
    text = os.environ.get(VARIABLE, "") or str(LOST_AFTER_SECONDS)
    with contextlib.suppress(ValueError):
        if 1.0 <= float(text) < float("inf"):
            return float(text)
    raise ValueError(f"{VARIABLE} must be a number of seconds of at least 1, got {text!r}: leave it out for {LOST_AFTER_SECONDS:.0f}")


class Silence:
    """For how long each rank, and the store, have given no sign: figures only, for the watcher's clock.

    Args:
        num_ranks: of the run.
        longest_step: seconds of which a step counts at most; more have passed if this process was stopped meanwhile.
    """

    def __init__(self, num_ranks: int, longest_step: float) -> None:
        self.of_ranks = [0.0] * num_ranks
        self.of_store = 0.0
        self.words = [""] * num_ranks
        self._longest_step, self._reading = longest_step, -1

    def step(self, seconds: float, reading: int, words: list[str]) -> None:
        """Count a step of the watcher.

        Args:
            seconds: since the last one.
            reading: number of the newest reading of the store.
            words: of all ranks in it, empty before the first.
        """
        seconds = min(seconds, self._longest_step)
        if reading == self._reading:  # nothing is known of the ranks while the store gives no answer
            self.of_store += seconds
            return
        self._reading, self.of_store = reading, 0.0
        known = seconds if words[0] != self.words[0] else 0.0  # rank 0 puts the words together: with it silent, nothing is known
        for rank, (old, new) in enumerate(zip(self.words, words, strict=True)):
            self.of_ranks[rank] = 0.0 if new != old else self.of_ranks[rank] + (known if rank else seconds)
        self.words = list(words)

    def silent(self, seconds: float) -> list[int]:
        """Return the ranks that were silent for so long, and neither left nor told of their failure."""
        ended = [word.startswith((_LEFT, _FAILED, _LOST)) for word in self.words]
        return [rank for rank, silence in enumerate(self.of_ranks) if silence >= seconds and not ended[rank]]


class Heartbeat:
    """This rank's beats and its watch over the others, from ``begin`` until ``leave``.

    Args:
        address: of the store.
        rank: of this process.
        world_size: number of ranks.
        lost_after: seconds after which a silent rank is lost.

    Attributes:
        tell_failure: called with one line before this process is ended for a loss; on every rank. The run's outcome is written by it.
    """

    def __init__(self, address: StoreAddress, rank: int, world_size: int, lost_after: float) -> None:
        self.tell_failure: Callable[[str], None] = lambda _text: None
        self._address, self._rank, self._lost_after = address, rank, lost_after
        self._beat_seconds = lost_after / BEATS_TO_LOSS
        self._silence = Silence(world_size, 2 * self._beat_seconds)
        self._readings: tuple[int, list[str]] = (0, [""] * world_size)
        self._failed_for = self._saving_for = 0.0
        self._has_told = False
        self._where = f"the store of the ranks at {address.host}:{address.port}"
        self._last_word = ""
        self._is_over = threading.Event()
        self._ending = threading.Lock()  # taken, and kept, by the thread that says this process's last word
        self._store: dist.Store | None = address.connect(lost_after)
        self._store.set(str(rank), "0")  # before the ranks meet: from then on there is a word of every rank
        if rank == 0:
            self._store.set(_ALL, json.dumps(self._silence.words))
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]

    def begin(self) -> None:
        """Start both threads, when all ranks have met."""
        for thread in self._threads:
            thread.start()

    def leave(self, error: BaseException | None = None) -> None:
        """Say goodbye, so that nobody misses this rank.

        Args:
            error: by which it ends, if it does; the others tell it.
        """
        if not self._ending.acquire(blocking=False):
            time.sleep(60.0)  # the watcher is ending this process, with the same words
        self._last_word = _last_word(error)
        self._is_over.set()
        if self._threads[0].is_alive():
            self._threads[0].join(self._beat_seconds)  # it may hang with the store
        self._let_others_read(error is not None)

    def name_lost(self) -> str:
        """Say, after a collective failed, which rank is lost; wait for some beats to know it. Empty if all are there."""
        end = time.monotonic() + 2 * BEATS_TO_SUSPECT * self._beat_seconds
        while time.monotonic() < end:
            if told := self._word_of_others() or self._silent_ranks(BEATS_TO_SUSPECT * self._beat_seconds):
                return told
            if self._silence.of_store and self._address.probe(self._beat_seconds) == "gone":
                return f"{self._address.server}, which served {self._where}, has ended"
            time.sleep(self._beat_seconds / 4)
        return ""

    def _beat(self) -> None:
        """Write and read, until the end; a store that is away is tried again."""
        count = 0
        while True:
            is_over = self._is_over.wait(self._beat_seconds if count else 0.0)
            count += 1
            try:
                self._store = self._store or self._address.connect(self._beat_seconds)
                self._store.set(str(self._rank), self._last_word if is_over else str(count))
                self._readings = (count, self._read(self._store))
            except RuntimeError:  # torch's errors of a store; the watcher tells how long it lasts
                self._store = None
            if is_over:
                return

    def _read(self, store: dist.Store) -> list[str]:
        """Return the words of all ranks; rank 0 gathers them for the others, so that the store answers W short questions a beat."""
        if self._rank:
            return json.loads(store.get(_ALL))
        words = store.multi_get([str(rank) for rank in range(len(self._silence.words))])
        store.set(_ALL, json.dumps(told := [word.decode(errors="replace") for word in words]))
        return told

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._is_over.wait(self._beat_seconds):
            now = time.monotonic()
            self._silence.step(now - last, *self._readings)
            verdict = self._verdict(min(now - last, 2 * self._beat_seconds))
            last = now
            if verdict and self._ending.acquire(blocking=False):
                self._end(verdict)

    def _verdict(self, seconds: float) -> str:
        """Return why this process must end; empty while it need not."""
        if lost := self._silent_ranks(self._lost_after):
            return lost
        told = self._word_of_others()
        # Other ranks' main threads mostly come to the same end by themselves, in the right order: this is for those that hang.
        self._failed_for = self._failed_for + seconds if told else 0.0
        if told and self._failed_for >= self._lost_after / 3:
            return told
        return self._verdict_on_store(seconds)

    def _silent_ranks(self, seconds: float) -> str:
        if not self._silence.silent(seconds):
            return ""
        # Ranks of a node that died together were heard of last within a beat or two of one another.
        lost = self._silence.silent(max(seconds - 2 * self._beat_seconds, 2 * self._beat_seconds))
        return f"{ranks_in_words(lost)} gave no sign of life for {seconds:.0f} s"

    def _word_of_others(self) -> str:
        """Return a loss that another rank saw first, or another rank's own failure."""
        for rank, word in enumerate(self._silence.words):
            if word.startswith(_LOST):
                return word.removeprefix(_LOST)
            if word.startswith(_FAILED) and rank != self._rank:
                return f"rank {rank} failed: {word.removeprefix(_FAILED)}"
        return ""

    def _verdict_on_store(self, seconds: float) -> str:
        """Return why this process must end when the store is lost; ask it to save first where its fellows may live."""
        silence, where = self._silence.of_store, self._where
        if silence < self._lost_after / 3 or self._silence.words[0] == _LEFT:  # in a run that is done, all end about now
            return ""
        state = self._address.probe(self._beat_seconds)
        if state == "gone" and self._address.is_of_rank_0:
            return f"rank 0, which served {where}, has ended"
        if state == "gone":
            return self._save_without_launcher(seconds)
        if silence < self._lost_after:
            return ""
        if state == "away" or self._address.is_of_rank_0:
            node = "" if self._address.is_of_rank_0 else ", and so the node of rank 0,"
            return f"{self._address.server}, which serves {where},{node} gave no sign of life for {self._lost_after:.0f} s"
        if not self._has_told:  # a launcher that is stopped: the ranks need it for nothing else
            self._has_told = True
            _say(f"{self._address.server}, which serves {where}, gives no answer: the ranks go on, but can't watch one another")
        return ""

    def _save_without_launcher(self, seconds: float) -> str:
        """Ask for a save, as the launcher is gone but this node's fellows may be there; name it as the reason if that does not end."""
        text = f"{self._address.server}, which served {self._where}, has ended"
        if not self._saving_for:
            _say(f"{text}: the ranks save and stop")
            os.kill(os.getpid(), signal.SIGTERM)  # the usual way to stop, if this process has come that far
        self._saving_for += seconds
        return text if self._saving_for >= 2 * self._lost_after else ""

    def _end(self, verdict: str) -> None:
        """End this process although its main thread may hang: the others hear of it, the line is out and the outcome written first."""
        self._last_word = f"{_LOST}{verdict}"
        self._is_over.set()
        _say(f"failed: {verdict}. {GO_ON}")
        with contextlib.suppress(Exception):  # whatever it is, this process must end
            self.tell_failure(verdict)
        self._threads[0].join(self._beat_seconds)
        self._let_others_read(True)
        os._exit(1)

    def _let_others_read(self, is_failure: bool) -> None:
        """Keep a store that this process serves for two beats: its end would be taken for the reason."""
        if is_failure and self._rank == 0 and self._address.is_of_rank_0:
            time.sleep(2 * self._beat_seconds)


_current: Heartbeat | None = None


def begin_heartbeat(heartbeat: Heartbeat) -> None:
    """Start the heartbeat of this process, of which there is one, as there is one process group."""
    global _current
    _current = heartbeat
    heartbeat.begin()


def current_heartbeat() -> Heartbeat | None:
    """Return the heartbeat of this process; None without fellows."""
    return _current


def leave_heartbeat(error: BaseException | None) -> None:
    """End this process's heartbeat, if there is one, with a word for the others."""
    global _current
    if _current is not None:
        _current.leave(error)
        _current = None


def _last_word(error: BaseException | None) -> str:
    if error is None:
        return _LEFT
    if isinstance(error, RankLost) and error.lost:
        return _LOST + error.lost
    return _FAILED + " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _say(text: str) -> None:
    """Print a line past Python's buffers, whose locks a main thread that hangs may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"dist-vsd: {text}\n".encode())
