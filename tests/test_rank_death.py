"""Ranks that die or are asked to stop: the others end with a reason, finished checkpoints stay, the job goes on.

The first test starts every process anew. In the others the launcher and what it sees of its ranks are real, and what a rank imports was
imported before (warm_python.py): a kill of the rank is a kill of the process that trains for it.
"""

import contextlib
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from dist_vsd.runs.outcome import read_outcome
from tests.ranks import Ranks
from tests.runs import TINY, checkpoint, finish, start

# The number of kills of the long test: each costs two ranks' start. The full claim is DIST_VSD_KILLS=20.
NUM_KILLS = int(os.environ.get("DIST_VSD_KILLS", "2"))
ENDLESS = ["a green duck", *TINY, "--num-updates", "100000", "--checkpoint-every", "4"]


def ranks_of(process):
    """Return {rank: pid} of the training processes that a launcher has started."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            variables = dict(pair.split("=", 1) for pair in (entry / "environ").read_text().split("\0") if "=" in pair)
            parent = int(re.search(r"PPid:\s+(\d+)", (entry / "status").read_text()).group(1))
        except (OSError, ValueError, AttributeError):
            continue
        if parent == process.pid and "RANK" in variables:
            found[int(variables["RANK"])] = int(entry.name)
    return found


def updates_logged(folder):
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["update"] for line in lines if "event" not in line), default=0)
    except (OSError, ValueError):
        return 0


def wait_until(condition, process=None, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)  # looking through all processes takes a while itself


def kill_all(process):
    ranks = ranks_of(process)  # before their launcher is gone, and with it the way to find them
    os.killpg(process.pid, signal.SIGKILL)
    for pid in ranks.values():
        os.kill(pid, signal.SIGKILL)


def newest(folder):
    """Return the update of the newest checkpoint that is finished (its manifest is written last)."""
    manifests = sorted((folder / "checkpoints").glob("update_*/manifest.json"))
    return json.loads(manifests[-1].read_text())["update"] if manifests else 0


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """Ranks find out sooner than by default who is lost."""
    monkeypatch.setenv("DIST_VSD_LOST_AFTER_SECONDS", "6")


def test_when_a_rank_is_killed_the_others_end_within_a_minute_and_say_why(tmp_path):
    folder = tmp_path / "run"
    process = start([*ENDLESS, "--run-dir", str(folder)], num_ranks=2, cold=True)
    wait_until(lambda: updates_logged(folder) >= 5, process)
    begin = time.monotonic()
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    code, output = finish(process)
    assert time.monotonic() - begin < 60
    assert code == 1
    assert "dist-vsd: failed: rank 1 gave no sign of life for " in output
    assert "go on with the same command and --resume" in output
    assert checkpoint(folder, newest(folder))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_any_one_rank_makes_all_save_at_the_same_update_and_exit_with_75(tmp_path, number):
    folder = tmp_path / "run"
    ranks = Ranks([*ENDLESS, "--checkpoint-every", "99999", "--run-dir", str(folder)], num_ranks=2)
    wait_until(lambda: updates_logged(folder) >= 2)
    ranks.signal(1, number)
    codes, output = ranks.finish()
    assert codes == [75, 75], output
    assert f"dist-vsd train --resume --run-dir {folder}" in output
    (saved,) = (folder / "checkpoints").iterdir()
    assert json.loads((saved / "manifest.json").read_text())["update"] == updates_logged(folder)


def ranks_under(folder):
    """Return the ids of the ranks that train into a folder, whoever their parent is."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if str(folder).encode() in words and b"RANK=" in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


def test_ranks_whose_launcher_is_killed_save_and_end(tmp_path):
    """A launcher that is killed by SIGKILL tells nobody, and takes the store of the ranks with it."""
    folder = tmp_path / "run"
    process = start([*ENDLESS, "--checkpoint-every", "99999", "--run-dir", str(folder)], num_ranks=2)
    wait_until(lambda: updates_logged(folder) >= 2, process)
    process.kill()
    process.wait()
    end = time.monotonic() + 120
    while ranks := set(ranks_under(folder)) - {process.pid}:
        assert time.monotonic() < end, f"they live on: {ranks}"
        time.sleep(0.1)
    output = process.stdout.read()
    assert "the launcher of this rank has gone: saving and stopping" in output
    assert f"dist-vsd train --resume --run-dir {folder}" in output
    (saved,) = (folder / "checkpoints").iterdir()
    assert json.loads((saved / "manifest.json").read_text())["update"] == updates_logged(folder)
    outcome = read_outcome(folder)
    assert (outcome.exit_code, outcome.update) == (75, updates_logged(folder))


def test_a_rank_killed_inside_a_checkpoint_loses_nothing_and_the_launcher_goes_on(tmp_path):
    folder = tmp_path / "run"
    arguments = ["a green duck", *TINY, "--num-updates", "12", "--keep-checkpoints", "9", "--run-dir", str(folder)]
    process = start(arguments, num_ranks=2, fault=("killed_inside_a_checkpoint", "1"), launch=["--max_restarts", "1"])
    code, output = finish(process)
    assert code == 0, output
    assert "resumed from update_00000004" in output
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [f"update_{u:08d}" for u in (4, 8, 12)]


def test_a_job_whose_ranks_are_killed_at_random_moments_goes_on_from_the_newest_checkpoint(tmp_path):
    folder, generator = tmp_path / "run", random.Random(0)
    launch = ["--max_restarts", str(NUM_KILLS)]
    process = start([*ENDLESS, "--run-dir", str(folder)], num_ranks=2, launch=launch)
    try:
        for _ in range(NUM_KILLS):
            before = updates_logged(folder)
            wait_until(lambda before=before: updates_logged(folder) != before and len(ranks_of(process)) == 2, process)
            time.sleep(generator.uniform(0.0, 3.0))
            finished, reached, ranks = newest(folder), updates_logged(folder), ranks_of(process)
            os.kill(ranks[generator.randrange(2)], signal.SIGKILL)
            wait_until(lambda ranks=ranks: len(now := ranks_of(process)) == 2 and not set(now.values()) & set(ranks.values()), process)
            assert newest(folder) >= finished, "a finished checkpoint is lost"
            assert reached - newest(folder) <= 5, "more than checkpoint_every updates are repeated"
        before = newest(folder)
        wait_until(lambda: newest(folder) > before, process)
    finally:
        kill_all(process)
        process.communicate()
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if "event" in line]
    assert all("passed over" not in line["event"] for line in events)
    assert checkpoint(folder, newest(folder))
