"""Who runs what, once: leases that survive dead owners, on one machine or over a cluster's shared file system.

A lease is a file ``<name>.<generation>`` that its owner touches every BEAT_SECONDS. The highest generation counts. A dead lease is
taken over by creating the next generation with O_EXCL, which one of many contenders can do; a release sets the heartbeat to 1970.
The highest file is never removed, so that a contender who looked long ago can't begin the numbers anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import tempfile
import threading
import time
from pathlib import Path

BEAT_SECONDS = 15.0
DEAD_AFTER_SECONDS = 90.0  # more than a beat and the minute for which NFS may show an old time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that holds a lease.

    Attributes:
        host: its name.
        boot: of that host, and the namespace of its process ids: where ``pid`` means something.
        pid: of the process.
        pid_start: when it was started, in clock ticks after boot, since process ids are used again.
        job: Slurm's id of its job or array task; empty outside one.
        since: when it took the lease, seconds since 1970 by its host.
    """

    host: str
    boot: str
    pid: int
    pid_start: int
    job: str
    since: float

    @classmethod
    def this_process(cls) -> Owner:
        """Return this process as an owner."""
        pid, job = os.getpid(), os.environ.get("SLURM_JOB_ID", "")
        return cls(host=socket.gethostname(), boot=_boot(), pid=pid, pid_start=process_start(pid) or 0, job=job, since=time.time())

    @property
    def is_here(self) -> bool:
        """Whether it lives or lived on this very host and boot, where its process can be looked at."""
        return bool(self.boot) and self.boot == _boot()

    @property
    def is_alive_here(self) -> bool:
        """Whether its process can be seen to be there."""
        return self.is_here and process_start(self.pid) == self.pid_start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (Slurm job {self.job})" if self.job else "")


@dataclasses.dataclass(frozen=True)
class LeaseFile:
    """A lease as found in its folder.

    Attributes:
        file: the newest generation.
        generation: its number.
        beat: when it was touched last, seconds since 1970 by the file system's clock; 0: released.
        owner: None while its first words are being written.
    """

    file: Path
    generation: int
    beat: float
    owner: Owner | None

    def is_alive(self, now: float) -> bool:
        """Whether its owner holds it; ``now`` is of ``file_system_now``."""
        if now - self.beat > DEAD_AFTER_SECONDS:
            return False
        return self.owner is None or not self.owner.is_here or self.owner.is_alive_here


class Lease:
    """A lease that this process holds until ``release``; a thread keeps it alive.

    Args:
        file: of the lease.
        generation: its number.
        descriptor: of the open file; touched by it, so that nobody else's lease ever is.
    """

    def __init__(self, file: Path, generation: int, descriptor: int) -> None:
        self._file, self._next = file, file.with_name(f"{file.name.rpartition('.')[0]}.{generation + 1}")
        self._descriptor = descriptor
        self._lost, self._released = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    @property
    def is_lost(self) -> bool:
        """Whether another process may hold it by now, since this one did not give a sign of life for too long."""
        return self._lost.is_set()

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._released.wait(BEAT_SECONDS):
            try:
                if self._next.exists() or not self._file.exists():
                    break
                os.utime(self._descriptor)
                last = time.monotonic()
            except OSError:  # a file system that is away for a moment
                if time.monotonic() - last > DEAD_AFTER_SECONDS:
                    break
        else:
            return
        self._lost.set()

    def release(self) -> None:
        """Give it back."""
        self._released.set()
        self._thread.join()
        if not self.is_lost:
            with contextlib.suppress(OSError):  # then it dies by its age
                os.utime(self._descriptor, (0, 0))
        os.close(self._descriptor)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()


def acquire(folder: Path, name: str) -> Lease | None:
    """Take a lease if nobody alive has it.

    Args:
        folder: of leases; made if need be.
        name: of the lease, without dots.

    Returns:
        The lease, or None if another process has it or was faster.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = find(folder, name)
    if held is not None and held.is_alive(file_system_now(folder)):
        return None
    generation = held.generation + 1 if held else 1
    file = folder / f"{name}.{generation}"
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    except FileExistsError:
        return None
    os.write(descriptor, json.dumps(dataclasses.asdict(Owner.this_process())).encode())
    os.fsync(descriptor)
    generations = _generations(folder, name)
    if max(generations) > generation:  # this process looked before others took the lease and removed its older files
        os.close(descriptor)
        file.unlink(missing_ok=True)
        return None
    for older in generations:
        if older < generation:
            (folder / f"{name}.{older}").unlink(missing_ok=True)
    return Lease(file, generation, descriptor)


def find(folder: Path, name: str) -> LeaseFile | None:
    """Return a lease as it is now, or None if nobody ever had it."""
    generations = _generations(folder, name)
    return _read(folder / f"{name}.{max(generations)}", max(generations)) if generations else None


def _generations(folder: Path, name: str) -> list[int]:
    return [generation for other, generation in _names(folder) if other == name]


def alive(folder: Path) -> dict[str, LeaseFile]:
    """Return all leases whose owners are alive, by name."""
    now, leases = file_system_now(folder), all_leases(folder)
    return {name: lease for name, lease in leases.items() if lease.is_alive(now)}


def all_leases(folder: Path) -> dict[str, LeaseFile]:
    """Return all leases that are held or whose owner died without giving them back, by name."""
    newest: dict[str, int] = {}
    for name, generation in _names(folder):
        newest[name] = max(generation, newest.get(name, 0))
    leases = {name: _read(folder / f"{name}.{generation}", generation) for name, generation in newest.items()}
    return {name: lease for name, lease in leases.items() if lease is not None and lease.beat > 0}


def _names(folder: Path) -> list[tuple[str, int]]:
    try:
        parts = [file.rpartition(".") for file in os.listdir(folder)]
    except FileNotFoundError:
        return []
    return [(name, int(number)) for name, _, number in parts if name and number.isdigit()]


def _read(file: Path, generation: int) -> LeaseFile | None:
    """Read a lease; None if it has just been taken over."""
    try:
        with open(file) as stream:  # opening first: NFS then asks its server for the time of the last beat
            beat = os.fstat(stream.fileno()).st_mtime
            text = stream.read() if beat > 0 else ""
    except FileNotFoundError:
        return None
    try:
        return LeaseFile(file, generation, beat, Owner(**json.loads(text)))
    except (ValueError, TypeError):
        return LeaseFile(file, generation, beat, None)


def file_system_now(folder: Path) -> float:
    """Return the present by the clock that stamps a folder's files; hosts of a cluster may disagree with it by minutes."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            return os.fstat(probe.fileno()).st_mtime
    except OSError:  # someone else's folder, looked at only
        return time.time()


def process_start(pid: int) -> int | None:
    """Return when a process was started, in clock ticks after boot; None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
