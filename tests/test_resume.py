"""A run that was stopped goes on to the bit."""

import json
import shutil
import signal
import time

import pytest
import torch

from dist_vsd.cli import main
from tests.ranks import Ranks
from tests.runs import TINY, checkpoint


def metrics(run_dir):
    """Return the logged figures but for seconds, speed and memory, which no two runs share."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("seconds/", "memory/", "speed/"))} for line in lines if "event" not in line]


def assert_same_to_the_bit(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []


@pytest.mark.parametrize("extra", [[], ["--representation", "image", "--objective", "sds"]], ids=["vsd-3d", "sds-image"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, extra):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main(["train", "a green duck", *TINY, *extra, "--run-dir", str(whole)]) == 0
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "update_00000008")
    assert main(["train", "--resume", "--run-dir", str(resumed)]) == 0
    assert_same_to_the_bit(checkpoint(whole, 8), checkpoint(resumed, 8))
    assert metrics(whole) == metrics(resumed)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_everything_says_how_to_go_on_and_exits_with_75(tmp_path, signal_number):
    long = [*TINY, "--num-updates", "100000", "--checkpoint-every", "100000"]
    ranks = Ranks(["a red cube", *long, "--run-dir", str(tmp_path / "run")])
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(metrics(tmp_path / "run")) < 2:
        assert ranks.processes[0].is_alive(), ranks.output(0)
        time.sleep(0.05)
    ranks.signal(0, signal_number)
    codes, output = ranks.finish()
    assert codes == [75], output
    assert f"dist-vsd train --resume --run-dir {tmp_path / 'run'}" in output
    done = max(line["update"] for line in metrics(tmp_path / "run"))
    assert checkpoint(tmp_path / "run", done)
