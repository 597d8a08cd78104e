"""What must hold on any number of ranks, shown with real processes on gloo.

By a random prior of a few thousand weights: nothing here depends on what a prior has learned (test_distributed.py has the embedded one).
"""

import json
import os
import re
import shutil

import pytest
import torch

from dist_vsd.distributed.collectives import Collectives
from dist_vsd.training import update as update_module
from tests.ranks import run_ranks
from tests.runs import TINY, checkpoint

FOUR = ["a green duck", *TINY, "--num-particles", "4", "--num-views", "2", "--num-updates", "4"]
FOUR += ["--micro-batch-size", "2"]  # convolutions round by the shape of a batch: the same for all
PRIOR = {}
LAYOUTS = {"2 ranks": {"num_ranks": 2}, "4 ranks": {"num_ranks": 4}, "2 x 2 views": {"num_ranks": 4, "shards": 2}}


@pytest.fixture(scope="module", autouse=True)
def prior_words(random_prior):
    """Have all runs that begin here use the random prior, at its size."""
    PRIOR["latent"] = ["--prior", random_prior, "--latent.resolution", "8"]
    PRIOR["embedded"] = ["--prior", random_prior]


def small(arguments):
    """Return the words of a run with those that make it small; a resumed run is what it was."""
    return arguments if "--resume" in arguments else [*arguments, *PRIOR["latent" if "latent" in arguments else "embedded"]]


def run(folder, arguments, num_ranks=1, shards=0, **options):
    """Train in a folder; it must end well."""
    words = [*small(arguments), "--num-shards", str(shards), "--run-dir", str(folder)]
    code, output = run_ranks(words, num_ranks=num_ranks, **options)
    assert code == 0, output
    return output


def relative_difference(one, other):
    """Return the greatest relative difference of a particle, or of phi, as a whole (the norm over its numbers), of two checkpoints."""
    assert one.keys() == other.keys()
    wholes = {}
    for name in one:
        if one[name].is_floating_point() and not name.endswith("/step"):
            wholes.setdefault(name.split("/")[0] + name.split(":")[0], []).append(name)
    join = [(torch.cat([one[n].flatten() for n in names]), torch.cat([other[n].flatten() for n in names])) for names in wholes.values()]
    return max(float((a - b).norm() / a.norm()) for a, b in join)


def metrics(folder):
    """Return the logged figures but for seconds, speed and memory, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("seconds/", "memory/", "speed/"))} for line in lines if "event" not in line]


def parameters(tensors):
    """Return theta and phi without their optimisers' moments."""
    return {n: t for n, t in tensors.items() if n.startswith("phi.safetensors") or ":theta/" in n and t.is_floating_point()}


def different(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """The final checkpoint of 4 particles on one rank: plain, and deterministic."""
    folder = tmp_path_factory.mktemp("one")
    run(folder / "plain", FOUR)
    run(folder / "deterministic", [*FOUR, "--deterministic"])
    return {name: checkpoint(folder / name, 4) for name in ("plain", "deterministic")}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_layout_does_not_change_theta_or_phi(tmp_path, one_rank, layout):
    """fp32 sums in another order differ by 1e-7 relative; Adam normalises gradients, also those that are rounding, and an occupancy
    cell at its threshold may flip: over 20 steps 2e-4 was seen, so these are 4."""
    run(tmp_path / "run", FOUR, **layout)
    assert relative_difference(parameters(one_rank["plain"]), parameters(checkpoint(tmp_path / "run", 4))) < 5e-4


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_deterministic_mode_gives_the_same_bits_on_any_layout(tmp_path, one_rank, layout):
    run(tmp_path / "run", [*FOUR, "--deterministic"], **layout)
    assert different(one_rank["deterministic"], checkpoint(tmp_path / "run", 4)) == []


def test_uneven_shards_weigh_every_render_alike(tmp_path):
    """5 particles on 2 ranks, 3 and 2: the same bits as on one."""
    five = ["a green duck", *TINY, "--num-particles", "5", "--num-updates", "4", "--deterministic"]
    run(tmp_path / "one", five)
    run(tmp_path / "two", five, num_ranks=2)
    assert different(checkpoint(tmp_path / "one", 4), checkpoint(tmp_path / "two", 4)) == []


# Latent particles render at once: what differs between ranks here is who takes part in an update.
UNEVEN = {
    "one of five steps, phi sees three": ["--particles.theta-batch", "1", "--particles.phi-batch", "3"],
    "three of five step, phi sees one": ["--particles.theta-batch", "3", "--particles.phi-batch", "1"],
    "one pass of phi serves twice": ["--score.reuse-pass", "--particles.theta-batch", "2", "--particles.phi-batch", "2"],
}


@pytest.fixture(scope="module")
def in_turns(request, tmp_path_factory):
    """The words of five particles that take turns, and what they become on one rank."""
    folder = tmp_path_factory.mktemp("turns")
    words = ["a duck", *TINY, "--preset", "latent", "--num-particles", "5", "--num-updates", "3", "--micro-batch-size", "1"]
    words += UNEVEN[request.param]
    run(folder / "one", words)
    return words, parameters(checkpoint(folder / "one", 3))


# Under ZeRO 3 a pass takes a second. In these a rank has fewer passes for theta, and none of its own for phi.
OF_ZERO_3 = ("three of five step, phi sees one", "one pass of phi serves twice")
TURNS = [(name, config) for name in UNEVEN for config in ("cpu", "deepspeed_zero3") if config == "cpu" or name in OF_ZERO_3]


@pytest.mark.parametrize(("in_turns", "config"), TURNS, indirect=["in_turns"])
def test_particles_that_take_turns_are_the_same_on_any_layout(tmp_path, in_turns, config):
    """In one of three updates at least a rank has no particle that takes part, and joins in the others' passes."""
    words, one = in_turns
    run(tmp_path / "two", words, num_ranks=2, config=config)
    assert relative_difference(one, parameters(checkpoint(tmp_path / "two", 3))) < 1e-4


@pytest.mark.parametrize("config", ["cpu", "deepspeed_zero1", "deepspeed_zero2"])
def test_phi_is_the_same_to_the_bit_on_all_ranks_after_every_update(tmp_path, config):
    """TINY compares phi after every update; an uneven deal makes the ranks' work differ (with ZeRO 3: that of particles in turns)."""
    arguments = ["a green duck", *TINY, "--num-particles", "3", "--num-updates", "3", "--micro-batch-size", "1"]
    run(tmp_path / "run", arguments, num_ranks=2, config=config)


def test_phi_is_the_same_to_the_bit_with_bf16_networks(tmp_path):
    run(tmp_path / "run", ["a green duck", *TINY, "--num-updates", "3", "--precision", "bf16"], num_ranks=2)


def test_a_forgotten_reduction_stops_the_run_at_the_next_check_and_names_the_ranks(tmp_path):
    arguments = ["a green duck", *TINY, "--check-every", "3", "--run-dir", str(tmp_path / "run")]
    code, output = run_ranks(small(arguments), num_ranks=2, fault=("no_reduction", "0"))
    assert code == 1, output
    assert "phi after update 3 differs between ranks: rank(s) 1 from rank 0" in output


def test_a_run_resumed_on_the_same_ranks_goes_on_to_the_bit(tmp_path):
    """Three ranks: with more than two, the order of a sum matters. Metrics too, but for seconds, speed and memory."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(whole, ["a green duck", *TINY, "--num-particles", "4", "--num-updates", "5", "--checkpoint-every", "3"], num_ranks=3)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "update_00000005")
    assert "resumed from update_00000003" in run(resumed, ["--resume"], num_ranks=3)
    assert different(checkpoint(whole, 5), checkpoint(resumed, 5)) == []
    assert metrics(whole) == metrics(resumed)


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    """2 -> 1 -> 4 ranks, against 2 from beginning to end."""
    arguments = ["a green duck", *TINY, "--num-particles", "4", "--num-updates", "4", "--checkpoint-every", "1", "--keep-checkpoints", "9"]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run(whole, arguments, num_ranks=2)
    shutil.copytree(whole, moved)
    for start, num_ranks in ((2, 1), (3, 4)):
        for update in range(start + 1, 5):
            shutil.rmtree(moved / "checkpoints" / f"update_{update:08d}")
        assert f"resumed from update_{start:08d}" in run(moved, ["--resume"], num_ranks=num_ranks)
    assert relative_difference(parameters(checkpoint(whole, 4)), parameters(checkpoint(moved, 4))) < 1e-4


@pytest.fixture(scope="module")
def on_ddp(tmp_path_factory):
    """A run of two ranks with all its checkpoints."""
    whole = tmp_path_factory.mktemp("ddp") / "whole"
    run(whole, ["a green duck", *TINY, "--num-updates", "4", "--checkpoint-every", "1", "--keep-checkpoints", "9"], num_ranks=2)
    return whole


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_moves_from_ddp_to_zero_and_back_with_its_moments(tmp_path, on_ddp, stage):
    whole, moved = on_ddp, tmp_path / "moved"
    shutil.copytree(whole, moved)
    for start, config in ((2, f"deepspeed_zero{stage}"), (3, "cpu")):
        for update in range(start + 1, 5):
            shutil.rmtree(moved / "checkpoints" / f"update_{update:08d}")
        assert f"resumed from update_{start:08d}" in run(moved, ["--resume"], num_ranks=2, config=config)
    one, other = checkpoint(whole, 4), checkpoint(moved, 4)
    moments = [n for n in one if n.startswith("phi_optimizer") and "/exp_avg" in n]
    assert len(moments) > 40
    assert relative_difference({n: one[n] for n in moments}, {n: other[n] for n in moments}) < 1e-3  # squares double it
    assert relative_difference(parameters(one), parameters(other)) < 1e-4
    steps = [n for n in one if n.endswith("/step")]
    assert different({n: one[n] for n in steps}, {n: other[n] for n in steps}) == []


def events(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [f"{line['update']}: {line['event']}" for line in lines if "event" in line]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("theta_becomes_nan", r"6: particle 1: it is not finite; it is restored from update_00000004"),
        ("render_is_nan", r"6: particle 1: its gradient is not finite; the step is skipped, the particle is as before it"),
        ("phi_loss_is_nan", r"6: phi's gradient is not finite: its step is skipped on all ranks \(this rank's loss is not finite\)"),
    ],
)
def test_what_is_not_finite_on_one_rank_is_mended_and_all_ranks_go_on(tmp_path, fault, says):
    output = run(tmp_path / "run", ["a green duck", *TINY], num_ranks=2, fault=(fault, "1"))
    assert "2 particle(s) are saved" in output
    assert any(re.fullmatch(says, event) for event in events(tmp_path / "run")), events(tmp_path / "run")
    tensors = checkpoint(tmp_path / "run", 8)
    assert all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point())


SHARED = ["a green duck", *TINY, "--num-particles", "1", "--check-every", "1"]  # the fault drifts at update 6


def test_a_particle_that_drifts_on_one_of_the_ranks_that_share_it_stops_the_run_and_names_them(tmp_path):
    code, output = run_ranks([*small(SHARED), "--run-dir", str(tmp_path / "run")], num_ranks=2, fault=("theta_drifts", "1"))
    assert code == 1, output
    assert "particle 0 after update 6 differs between the ranks that share it: rank(s) 1 from rank 0" in output


def test_an_occupancy_grid_is_refreshed_on_one_rank_and_sent_to_those_that_share_the_particle(tmp_path):
    """A rank that would refresh it otherwise is not asked: the run is the same as without the fault."""
    short = [*SHARED, "--num-updates", "4"]  # it is refreshed twice
    run(tmp_path / "faulty", short, num_ranks=2, fault=("grid_is_refreshed_otherwise", "1"))
    run(tmp_path / "plain", short, num_ranks=2)
    assert different(checkpoint(tmp_path / "faulty", 4), checkpoint(tmp_path / "plain", 4)) == []


def tell_order():
    """Have rank 0 print when it renders, when a sum over the ranks that share a particle begins and is waited for, and when phi learns."""

    def telling(module, name, word):
        original = getattr(module, name)

        def told(*arguments, **options):
            print(f"order: {word}" if os.environ["RANK"] == "0" else "")
            result = original(*arguments, **options)
            if name != "begin_sum_over_views":
                return result
            return lambda: (print("order: wait" if os.environ["RANK"] == "0" else ""), result())[1]

        setattr(module, name, told)

    telling(update_module, "render", "render")
    telling(update_module, "update_phi", "phi")
    telling(Collectives, "begin_sum_over_views", "begin")


def test_the_sum_over_ranks_that_share_a_particle_travels_beside_the_next_render_or_phis_step(tmp_path):
    two = ["a green duck", *TINY, "--num-particles", "2", "--micro-batch-size", "1", "--num-updates", "1"]
    output = run(tmp_path / "run", two, num_ranks=2, shards=1, extension="tests.test_ranks:tell_order")
    assert re.findall(r"order: (\w+)", output) == ["render", "begin", "render", "wait", "begin", "phi", "wait"]


@pytest.mark.parametrize("config", ["cpu", "deepspeed_zero2", "deepspeed_zero3"])
def test_an_overflow_on_one_rank_that_lasts_lowers_the_loss_scale_on_all_until_phi_steps(tmp_path, config):
    latents = ["a duck", *TINY, "--preset", "latent", "--num-particles", "2", "--num-updates", "6"]  # they render at once
    output = run(tmp_path / "run", latents, num_ranks=2, config=config, fault=("phi_overflows", "1"))
    # 200 x scale is below fp16's 65,504 at 256 (2^13 halved five times), and one of six updates is left.
    told = [(step == "True", float(scale)) for step, scale in re.findall(r"rank 0: step (\w+), scale (\S+)", output)]
    assert told == [(False, 2.0**power) for power in (12, 11, 10, 9, 8)] + [(True, 256.0)]
    assert re.findall(r"rank 1: step (\w+), scale (\S+)", output) == re.findall(r"rank 0: step (\w+), scale (\S+)", output)
    skipped = [line for line in events(tmp_path / "run") if "phi's gradient is not finite" in line]
    assert [line.split(": ")[0] for line in skipped] == ["1", "2", "3", "4", "5"]
    assert skipped[4].endswith("its step is skipped on all ranks; its loss is scaled by 256 from now on")
    saved = checkpoint(tmp_path / "run", 6)
    assert saved["phi_optimizer.safetensors:loss_scale/value"].item() == 256
    assert saved["phi_optimizer.safetensors:loss_scale/num_good_steps"].item() == 1
    assert {value.item() for name, value in saved.items() if name.startswith("phi_opt") and name.endswith("/step")} == {1}
