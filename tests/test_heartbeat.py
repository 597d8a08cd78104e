"""Lost ranks are named on the ranks that are left, whatever their main threads wait in, and the outcome is written."""

import datetime
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from torch.distributed import TCPStore

from dist_vsd.distributed import heartbeat as module
from dist_vsd.distributed.heartbeat import Heartbeat, RankLost, Silence, lost_after_seconds
from dist_vsd.distributed.store import StoreAddress
from dist_vsd.runs.outcome import read_outcome
from tests.ranks import Ranks
from tests.runs import TINY, environment

ENDLESS = ["a green duck", *TINY, "--num-updates", "100000", "--checkpoint-every", "99999"]


def updates_logged(folder):
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["update"] for line in lines if line.endswith("}") and "event" not in line), default=0)


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Start ranks that run into tmp_path/run and lose one another after six seconds; wait for their second update."""
    monkeypatch.setenv("DIST_VSD_LOST_AFTER_SECONDS", "6")
    all_ranks = []

    def start(num_ranks, **options):
        ranks = Ranks([*ENDLESS, "--num-particles", str(num_ranks), "--run-dir", str(tmp_path / "run")], num_ranks, **options)
        all_ranks.append(ranks)
        wait_until(lambda: updates_logged(tmp_path / "run") >= 2)
        return ranks

    yield start
    for ranks in all_ranks:
        for process in ranks.processes:
            process.kill()


@pytest.mark.parametrize(("lost", "number"), [(1, signal.SIGSTOP), (0, signal.SIGSTOP), (1, signal.SIGKILL), (0, signal.SIGKILL)])
def test_a_lost_rank_is_named_by_all_others_which_end_with_1_and_write_the_outcome(started, tmp_path, lost, number):
    """A rank that is stopped keeps its connections: gloo waits for it, as NCCL does for a killed one."""
    ranks = started(3)
    ranks.signal(lost, number)
    living = [rank for rank in range(3) if rank != lost]
    for rank in living:
        ranks.processes[rank].join(60)
    lines = {rank: ranks.output(rank).splitlines() for rank in living}
    codes, output = ranks.finish(of=living)
    assert [codes[rank] for rank in living] == [1, 1], output
    for rank in living:
        (told,) = [line for line in lines[rank] if line.startswith("dist-vsd: failed: ")]
        assert f"rank {lost} gave no sign of life for " in told
        assert told.endswith("go on with the same command and --resume")
    outcome = read_outcome(tmp_path / "run")
    assert outcome.exit_code == 1
    assert outcome.error.startswith(f"rank {lost} gave no sign of life for ")


def test_a_rank_that_breaks_by_itself_is_named_with_its_error(started, tmp_path):
    codes, output = started(2, fault=("rank_breaks", "1")).finish()
    assert codes == [1, 1], output
    assert "dist-vsd: failed: rank 1 failed: RuntimeError: this rank alone is broken (while it ran: " in output
    assert read_outcome(tmp_path / "run").error.startswith("rank 1 failed: RuntimeError: this rank alone is broken")


def test_ranks_that_lose_the_store_of_a_launcher_that_has_ended_save_and_stop(started, tmp_path):
    ranks = started(2)
    ranks.store = None
    codes, output = ranks.finish()
    assert codes == [75, 75], output
    # A rank that notices stops both at the same update; the other one may have ended before it notices itself.
    told = output.count("dist-vsd: the launcher of node 0, which served the store of the ranks at 127.0.0.1:")
    assert 1 <= told == output.count(", has ended: the ranks save and stop\n")
    assert read_outcome(tmp_path / "run").update == updates_logged(tmp_path / "run")


def test_a_stop_is_no_loss(started, tmp_path):
    ranks = started(2)
    ranks.signal(1, signal.SIGTERM)
    codes, output = ranks.finish()
    assert codes == [75, 75], output
    assert "no sign of life" not in output
    assert read_outcome(tmp_path / "run").exit_code == 75


def test_silence_is_counted_by_the_watchers_own_running_time_and_ends_with_a_new_word():
    silence = Silence(3, longest_step=2.0)
    silence.step(1.0, 1, ["1", "1", "1"])
    silence.step(1.0, 2, ["2", "1", "left"])
    silence.step(600.0, 3, ["3", "1", "left"])  # stopped itself for ten minutes
    assert silence.of_ranks[:2] == [0.0, 3.0]
    assert (silence.silent(3.0), silence.silent(3.1)) == ([1], [])
    silence.step(1.0, 3, ["3", "1", "left"])  # the store gave no answer: nothing is known of the ranks
    assert (silence.of_store, silence.of_ranks[1]) == (1.0, 3.0)
    silence.step(1.0, 4, ["4", "failed: x", "left"])
    silence.step(9.0, 5, ["5", "failed: x", "left"])
    assert (silence.of_store, silence.silent(1.0)) == (0.0, [])


def test_while_rank_0_which_gathers_the_words_is_silent_nothing_is_known_of_the_others():
    silence = Silence(3, longest_step=2.0)
    silence.step(1.0, 1, ["1", "1", "1"])
    for reading in range(2, 6):
        silence.step(1.0, reading, ["1", "1", "1"])
    assert silence.of_ranks == [4.0, 0.0, 0.0]


@pytest.fixture
def pair():
    """Two heartbeats on one store, which beat ten times a second."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=20))
    beats = [Heartbeat(StoreAddress("127.0.0.1", store.port, "0", False), rank, 2, 1.0) for rank in range(2)]
    yield beats
    for beat in beats:
        beat._is_over.set()  # one that was "ended" here keeps who would leave waiting for the end of the process


def test_the_word_of_a_rank_that_saw_a_loss_first_is_everyones(pair, monkeypatch):
    ended, told = [], []
    monkeypatch.setattr(module.os, "_exit", ended.append)
    pair[0].tell_failure = told.append
    for beat in pair:
        beat.begin()
    pair[1].leave(RankLost("a long message", lost="rank 7 gave no sign of life for 9 s"))
    wait_until(lambda: ended)
    assert (ended, told) == ([1], ["rank 7 gave no sign of life for 9 s"])


def test_a_rank_that_left_is_not_missed(pair, monkeypatch):
    ended = []
    monkeypatch.setattr(module.os, "_exit", ended.append)
    for beat in pair:
        beat.begin()
    pair[1].leave()
    wait_until(lambda: pair[0]._silence.words[1] == "left")
    reading = pair[0]._readings[0]
    wait_until(lambda: pair[0]._readings[0] > reading + 2 * module.BEATS_TO_LOSS)
    assert ended == []
    assert pair[0].name_lost() == ""


@pytest.mark.parametrize("text", ["0", "0.5", "soon", "inf", "nan"])
def test_a_limit_that_is_no_number_of_seconds_is_refused(monkeypatch, text):
    monkeypatch.setenv("DIST_VSD_LOST_AFTER_SECONDS", text)
    with pytest.raises(ValueError, match=f"DIST_VSD_LOST_AFTER_SECONDS must be a number of seconds of at least 1, got '{text}'"):
        lost_after_seconds()


RANK = """
import time
from dist_vsd.distributed.launcher import stop_with_launcher
stop_with_launcher()
print("rank", flush=True)
time.sleep(600)
"""
# Starts its rank from a thread, which ends, and prints the rank's process id.
LAUNCHER = """
import subprocess, sys, threading
thread = threading.Thread(target=lambda: print(subprocess.Popen([sys.executable, "-c", sys.argv[1]]).pid, flush=True))
thread.start()
thread.join()
sys.stdin.read()
"""


def test_a_rank_stops_with_its_launcher_and_not_with_the_thread_that_started_it():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, RANK], env=environment() | {"TORCHELASTIC_RUN_ID": "x"}, **pipes)
    rank = int(launcher.stdout.readline())
    assert launcher.stdout.readline() == "rank\n"
    time.sleep(1.5)  # longer than it takes to look once
    os.kill(rank, 0)
    launcher.kill()
    assert launcher.stdout.read() == "dist-vsd: the launcher of this rank has gone: saving and stopping\n"  # until the rank ends
    launcher.wait()
