"""Leases: one owner at a time, among real processes that are killed and frozen."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dist_vsd.runs import lease as leases
from tests.runs import environment

# Takes the lease "run" of a folder, says so or not, and holds it until it is told to let go or loses it.
CONTENDER = """
import sys, time
from pathlib import Path
from dist_vsd.runs import lease as leases
leases.BEAT_SECONDS, leases.DEAD_AFTER_SECONDS = float(sys.argv[2]), float(sys.argv[3])
while time.time() < float(sys.argv[4]):
    pass
lease = leases.acquire(Path(sys.argv[1]), "run")
print("mine" if lease else "not mine", flush=True)
if lease and sys.argv[5] == "until lost":
    end = time.monotonic() + 30
    while not lease.is_lost and time.monotonic() < end:
        time.sleep(0.01)
    print("lost" if lease.is_lost else "kept", flush=True)
elif lease:
    sys.stdin.read()
    lease.release()
    print("released", flush=True)
"""


def contend(folder, count=1, beat=15.0, dead_after=90.0, until="told"):
    """Start processes that all reach for the lease at the same moment."""
    begin = time.time() + (1.0 if count > 1 else 0.0)
    command = [sys.executable, "-c", CONTENDER, str(folder), str(beat), str(dead_after), str(begin), f"until {until}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, env=environment(), **pipes) for _ in range(count)]


def is_free(folder):
    """Take the lease in this process, and give it back."""
    lease = leases.acquire(folder, "run")
    if lease is not None:
        lease.release()
    return lease is not None


def words(processes):
    return [process.stdout.readline().strip() for process in processes]


def end(processes):
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("before", ["nobody", "released", "killed", "too old"])
def test_of_twenty_contenders_one_gets_the_lease(tmp_path, before):
    if before == "released":
        leases.acquire(tmp_path, "run").release()
    elif before == "killed":
        first = contend(tmp_path)
        assert words(first) == ["mine"]
        end(first)  # by SIGKILL
    elif before == "too old":
        (tmp_path / "run.7").write_text("")
        os.utime(tmp_path / "run.7", (time.time() - 91, time.time() - 91))
    processes = contend(tmp_path, count=20)
    try:
        assert sorted(words(processes)) == ["mine"] + ["not mine"] * 19
        assert len(list(tmp_path.iterdir())) == 1, "older generations are removed"
    finally:
        end(processes)


def test_a_killed_owner_is_seen_at_once_on_its_own_host_and_after_the_bound_elsewhere(tmp_path, monkeypatch):
    (owner,) = contend(tmp_path)
    assert words([owner]) == ["mine"]
    assert not is_free(tmp_path)
    end([owner])
    monkeypatch.setattr(leases, "_boot", lambda: "another host")
    assert not is_free(tmp_path), "from elsewhere it may be alive"
    (file,) = tmp_path.iterdir()
    os.utime(file, (time.time() - 91, time.time() - 91))
    assert is_free(tmp_path)


def test_the_process_id_of_a_dead_owner_given_to_another_process_is_not_taken_for_it(tmp_path):
    lease = leases.acquire(tmp_path, "run")
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text().replace('"pid_start": ', '"pid_start": 1'))
    assert is_free(tmp_path)
    lease.release()


def test_a_frozen_owner_that_comes_back_notices_that_it_lost_the_lease(tmp_path, monkeypatch):
    (owner,) = contend(tmp_path, beat=0.1, dead_after=1.0, until="lost")
    assert words([owner]) == ["mine"]
    monkeypatch.setattr(leases, "DEAD_AFTER_SECONDS", 1.0)
    time.sleep(1.5)
    assert not is_free(tmp_path), "it beats"
    os.kill(owner.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while (lease := leases.acquire(tmp_path, "run")) is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(owner.pid, signal.SIGCONT)
    assert words([owner]) == ["lost"]
    assert not lease.is_lost
    lease.release()
    end([owner])


def test_a_released_lease_is_free_at_once_and_its_owner_is_not_said_to_have_died(tmp_path):
    (owner,) = contend(tmp_path)
    assert words([owner]) == ["mine"]
    assert list(leases.alive(tmp_path)) == ["run"]
    owner.communicate("")
    assert leases.all_leases(tmp_path) == {}
    assert is_free(tmp_path)


def test_who_looked_before_others_took_the_lease_and_let_it_go_does_not_begin_its_numbers_anew(tmp_path, monkeypatch):
    leases.acquire(tmp_path, "run").release()
    stale = leases.find(tmp_path, "run")
    leases.acquire(tmp_path, "run").release()
    mine = leases.acquire(tmp_path, "run")
    monkeypatch.setattr(leases, "find", lambda *_: stale)
    assert leases.acquire(tmp_path, "run") is None
    assert [file.name for file in tmp_path.iterdir()] == ["run.3"]
    mine.release()


def test_age_is_counted_by_the_file_systems_clock_not_the_hosts(tmp_path, monkeypatch):
    lease = leases.acquire(tmp_path, "run")
    monkeypatch.setattr(leases.time, "time", lambda: 4e9)
    assert list(leases.alive(tmp_path)) == ["run"]
    lease.release()
