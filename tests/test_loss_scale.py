"""training/phi/loss_scale.py: an overflow that lasts costs phi a few steps and not all of them."""

import shutil

import pytest
import torch

from dist_vsd.distributed.collectives import Collectives
from dist_vsd.distributed.layout import Layout
from dist_vsd.training.phi.loss_scale import FP16_START, LossScale
from dist_vsd.training.phi.trainers import OrderedPhi, PlainPhi
from tests.ranks import run_ranks
from tests.runs import TINY, checkpoint


def after(scale, *steps):
    for took_step in steps:
        scale.update(torch.tensor(not took_step))
    return scale.value


def test_it_halves_at_an_overflow_and_doubles_after_a_run_of_good_steps_up_to_its_start():
    scale = LossScale(8.0, num_steps_to_double=3)
    assert after(scale, False) == 4
    assert after(scale, False) == 2
    assert after(scale, True, True) == 2
    assert after(scale, True) == 4
    assert after(scale, True, True, True) == 8
    assert after(scale, *[True] * 9) == 8


def test_a_skipped_step_begins_the_count_of_good_ones_anew():
    scale = LossScale(8.0, num_steps_to_double=3)
    assert after(scale, False, False, True, True, False) == 1
    assert after(scale, True, True) == 1
    assert after(scale, True) == 2


def test_it_never_falls_below_one():
    assert after(LossScale(4.0), *[False] * 9) == 1


def test_only_fp16_is_scaled_and_nothing_else_keeps_anything():
    assert (LossScale.of("fp16").value, LossScale.of("fp16").is_used) == (FP16_START, True)
    for precision in ("", "fp32", "bf16"):
        scale = LossScale.of(precision)
        assert after(scale, False, *[True] * 1000, False) == 1
        assert not scale.is_used
        assert scale.tensors() == {}


def test_what_is_saved_brings_the_scale_and_its_count_back_and_leaves_the_rest():
    scale, other = LossScale(8.0, num_steps_to_double=3), LossScale(8.0, num_steps_to_double=3)
    after(scale, False, False, True, True)
    moments = {"a/step": torch.tensor(1.0)}
    assert other.load(scale.tensors() | moments) == moments
    assert (other.value, after(other, True)) == (2, 4)
    fresh = LossScale(8.0)
    assert fresh.load(moments) == moments  # of a checkpoint from before there was a scale to save
    assert fresh.value == 8
    plain = LossScale(1.0)
    assert plain.load(scale.tensors()) == {}
    assert plain.value == 1


class OneMatrix(torch.nn.Module):
    """All that a trainer asks of eps_phi."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.ones(2, 2))

    def phi(self):
        return {"matrix": self.matrix}

    def forward(self, x):
        return x @ self.matrix


def trainer(kind, start):
    score = OneMatrix()
    optimizer = torch.optim.AdamW(score.phi().values(), lr=0.1, fused=True)
    return kind(score, optimizer, Collectives(Layout.of(1)), LossScale(start))


def step(phi):
    # In fp16 the gradient is 100 times the scale: 65,504 lies between 512 and 1,024 of it.
    phi.accumulate(lambda eps_phi: 100 * eps_phi(torch.eye(2)).half().float().sum(), [(0, 0)], True)
    return not phi.step(0.1, [(0, 0)])


@pytest.mark.parametrize("kind", [PlainPhi, OrderedPhi])
def test_an_overflow_that_lasts_is_over_after_a_few_updates(kind):
    phi, unhurt = trainer(kind, FP16_START), trainer(kind, 512.0)
    assert [step(phi) for _ in range(6)] == [False, False, False, False, True, True]
    assert [step(unhurt) for _ in range(2)] == [True, True]
    assert phi.loss_scale.value == 512
    assert torch.equal(phi.score.matrix, unhurt.score.matrix)  # what was skipped left no trace
    assert phi.optimizer.state[phi.score.matrix]["step"] == 2


def test_a_run_stopped_while_its_scale_falls_goes_on_to_the_bit(tmp_path):
    """Its scale is 2,048 at the checkpoint of update 2, and 512 when phi steps for the first time, in update 5."""
    tiny = [*TINY, "--preset", "latent", "--num-particles", "2", "--num-updates", "6", "--checkpoint-every", "2", "--keep-checkpoints", "9"]
    fault = ("phi_overflows", "0")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    code, output = run_ranks(["a duck", *tiny, "--run-dir", str(whole)], fault=fault)
    assert code == 0, output
    shutil.copytree(whole, resumed)
    for update in (4, 6):
        shutil.rmtree(resumed / "checkpoints" / f"update_{update:08d}")
    assert checkpoint(resumed, 2)["phi_optimizer.safetensors:loss_scale/value"].item() == 2048
    code, output = run_ranks(["--resume", "--run-dir", str(resumed)], fault=fault)
    assert code == 0, output
    one, other = checkpoint(whole, 6), checkpoint(resumed, 6)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert one["phi_optimizer.safetensors:loss_scale/value"].item() == 512
