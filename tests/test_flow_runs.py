"""Runs on rectified flows by the command line: every objective, samples, a stop and the same bits after it; real sizes on shapes alone."""

import json
import shutil

import pytest
import torch

from dist_vsd.cli import main
from dist_vsd.commands.bench_update import UpdateArguments, words_to_config
from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.priors.flow_architectures import FLOW_ARCHITECTURES, RandomFlowPrior, build_transformer
from dist_vsd.priors.table import load_prior
from dist_vsd.scaling.counted_memory import count_peak
from dist_vsd.scaling.counted_prior import count_prior
from dist_vsd.scaling.room import card_for, with_zero_3
from dist_vsd.scaling.stage_times import ENCODER_FORWARD, ENCODER_FORWARD_BACKWARD, UNET_FORWARD, UNET_LORA_FORWARD_BACKWARD
from dist_vsd.serialization import read_tensors
from tests.ranks import run_ranks
from tests.runs import TINY, checkpoint
from tests.test_ranks import parameters, relative_difference
from tests.tiny_flows import FLOWS, write_flow

GIB = 2**30
OBJECTIVES = ("vsd", "sds", "denoising", "ancestral")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("flows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIST_VSD_CACHE", str(root / "cache"))
        yield {kind: str(write_flow(kind, root / kind)) for kind in FLOWS}


def trained(run_dir, prior, *words):
    """Run `train` on a prior; return theta of its first particle, as it was saved last."""
    asked = ["train", "a red car", "--prior", prior, "--run-dir", str(run_dir), *TINY, "--num-particles", "1", "--wandb.mode", "disabled"]
    assert main([*asked, *words]) == 0
    return read_tensors(max((run_dir / "checkpoints").glob("update_*")) / "particles" / "0000.safetensors")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", FLOWS)
def test_every_objective_runs_on_every_flow(folders, tmp_path, kind, objective):
    words = ["--representation", "image", "--objective", objective, "--num-updates", "2", "--checkpoint-every", "2"]
    theta = trained(tmp_path / "run", folders[kind], *words, "--ancestral.num-steps", "2")
    assert all(tensor.isfinite().all() for tensor in theta.values() if tensor.is_floating_point())


@pytest.mark.parametrize("kind", FLOWS)
def test_samples_are_drawn(folders, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    words = ["--num-steps", "2", "--num-samples", "1", "--flow.shift", "2"]
    assert main(["prior", "sample", "a duck", "--prior", folders[kind], *words]) == 0
    assert (tmp_path / "sample.png").exists()


def test_a_run_in_3d_that_is_stopped_goes_on_to_the_bit(folders, tmp_path):
    whole = trained(tmp_path / "whole", folders["sd3"], "--num-updates", "4", "--checkpoint-every", "2")
    run_dir = tmp_path / "run"
    trained(run_dir, folders["sd3"], "--num-updates", "4", "--checkpoint-every", "2")
    newest = max((run_dir / "checkpoints").glob("update_*"))
    for file in newest.rglob("*"):  # as if it had been stopped before
        file.unlink() if file.is_file() else None
    (run_dir / "outcome.json").unlink()
    again = trained(run_dir, folders["sd3"], "--num-updates", "4", "--checkpoint-every", "2", "--resume")
    assert whole.keys() == again.keys()
    assert [name for name, tensor in whole.items() if not torch.equal(tensor, again[name])] == []


def test_a_shift_that_is_asked_for_stands_in_the_run_and_changes_it(folders, tmp_path):
    thetas = []
    for shift in ("None", "9"):
        words = ["--representation", "image", "--num-updates", "2", "--checkpoint-every", "2", "--flow.shift", shift]
        thetas.append(trained(tmp_path / shift, folders["sd3"], *words))
    assert any(not torch.equal(tensor, thetas[1][name]) for name, tensor in thetas[0].items())
    assert "shift: 9.0" in (tmp_path / "9" / "config.yaml").read_text()


# Real sizes

# As counted in the published checkpoints (2.03, 2.24 and 8.06 billion).
TRANSFORMERS = {"sd3-medium": 2_028_328_000, "sd35-medium": 2_243_171_520, "sd35-large": 8_056_627_520}


@pytest.mark.parametrize("size", TRANSFORMERS)
def test_transformers_have_the_published_numbers_of_parameters(size):
    assert sum(parameter.numel() for parameter in build_transformer(size, "meta").parameters()) == TRANSFORMERS[size]
    prior = RandomFlowPrior(size, "meta", torch.bfloat16)
    assert (prior.image_size, prior.latent_shape, prior.process.shift) == (1024, (16, 128, 128), 3.0)


def test_a_random_flow_is_the_same_wherever_it_is_built_and_finite():
    one, other = (load_prior("random:tiny-sd3") for _ in range(2))
    assert FLOW_ARCHITECTURES["tiny-sd3"].transformer["sample_size"] == one.latent_shape[1]
    x_t, s, y = torch.ones(1, *one.latent_shape), torch.tensor([0.5]), one.embed(["a duck"]).cond
    predicted = one.predict(x_t, s, y)
    assert predicted.isfinite().all()
    assert torch.equal(predicted, other.predict(x_t, s, y))
    assert not torch.equal(one.network_of("random:tiny-sd3")(x_t, s, y), predicted)  # another checkpoint's


def test_large_at_512_pixels_fits_40_gb_and_with_zero_3_of_eight_24():
    """Where phi computes its activations again it takes 18.7 GiB, as docs/flow-priors.md counts them."""
    config = merge(load_preset("stable-diffusion-3"), {"prompt": "a duck", "prior": "random:sd35-large"}, "test")
    large, weights = count_peak(config, Layout.of(1)).num_bytes, 2 * TRANSFORMERS["sd35-large"]
    assert large / GIB == pytest.approx(31.6, abs=0.05)
    assert card_for(large) == "fits a card of 40 GB"
    # Of 15 GiB of bf16 weights 1/8 stays on each of eight ranks, and 10^9 weights are gathered at a time: 11.3 GiB less.
    assert with_zero_3(large, weights, 8) == pytest.approx(large - weights * 7 / 8 + 2e9)
    assert card_for(with_zero_3(large, weights, 8)) == "fits a card of 24 GB"
    assert with_zero_3(5e9, 1e9, 4) == 5e9  # all of it is gathered at a time


def test_plan_counts_medium_whose_passes_cost_what_its_widths_say(capsys):
    capsys.readouterr()
    assert main(["plan", "--gpus", "8", "--num-particles", "8", "--size", "sd3-medium", "--gpu-tflops", "1", "--json", "-"]) == 0
    (scale,) = json.loads(capsys.readouterr().out)["scales"]
    assert scale["peak_bytes"] / GIB == pytest.approx(10.9, abs=0.05)  # fits a card of 24 GB, and of 16
    assert scale["zero_3_peak_bytes"] == scale["peak_bytes"] - 2 * TRANSFORMERS["sd3-medium"] * 7 / 8 + 2e9
    # A block has 12 width^2 weights for a token of the picture and as many for one of the text, of which the last one reads keys and values
    # and queries alone; attention is over all tokens. A multiplication and its addition are two.
    width, depth, picture, text = 1536, 24, 32 * 32, 77 + 256
    of_tokens = 2 * 12 * width**2 * (depth * (picture + text) - text) + 2 * 3 * width**2 * text
    passes = 3 * (of_tokens + 4 * width * depth * (picture + text) ** 2) / 1e12
    # Embeddings of patches, texts and times, and each block's modulation, come on top.
    assert scale["seconds"]["scores"] == pytest.approx(passes, rel=0.01)


def test_the_counted_passes_are_those_of_the_constants_for_stable_diffusion():
    """Of stage_times.py: today's network is given its text's keys, and LoRA is added otherwise."""
    work = count_prior("sd21")
    found = (work.network_forward, work.lora_forward_backward, work.encoder_forward, work.encoder_forward_backward)
    assert found == pytest.approx((UNET_FORWARD, UNET_LORA_FORWARD_BACKWARD, ENCODER_FORWARD, ENCODER_FORWARD_BACKWARD), rel=0.01)


def test_plan_and_bench_know_the_sizes_of_flows_and_refuse_others(tmp_path, capsys):
    config = words_to_config(UpdateArguments(size="sd35-large"), (), "bf16")
    assert (config.prior, config.render_size, config.flow.image_size) == ("random:sd35-large", 512, 512)
    assert main(["plan", "--size", "sd3"]) == 2
    assert "--size must be one of sd21, sd15, sdxl, sd3-medium, sd35-medium, sd35-large, got 'sd3'" in capsys.readouterr().err
    assert main(["plan", "--size", "sdxl", "--measured", str(tmp_path)]) == 2
    assert "--measured says what was run, --size what is counted instead" in capsys.readouterr().err
    assert main(["bench", "update", "--size", "sd3-medium", "--as-published", "--count-only", "--out", str(tmp_path)]) == 2
    assert "--as-published is the update of Stable Diffusion 2.1 and XL" in capsys.readouterr().err


def test_bench_update_counts_a_flow(tmp_path):
    words = ["--render-size", "16", "--precision", "fp32", "--count-only", "--out", str(tmp_path)]
    assert main(["bench", "update", "--size", "tiny-sd3", *words]) == 0
    (row,) = json.loads((tmp_path / "update.json").read_text())["rows"]
    assert row["flop_by_stage"]["scores"] > 0


# Several ranks


@pytest.fixture(scope="module")
def on_one_rank(tmp_path_factory):
    return on_ranks(tmp_path_factory.mktemp("flow") / "run", 1)


def on_ranks(run_dir, num_ranks, config="cpu", resumed=False):
    """Train two particles on a random flow by the command line's own launch; return all of the last checkpoint."""
    words = ["a red car", "--prior", "random:tiny-sd3", "--flow.image-size", "16", *TINY, "--num-particles", "2", "--checkpoint-every", "2"]
    words = ["--resume"] if resumed else [*words, "--num-updates", "4", "--micro-batch-size", "1", "--wandb.mode", "disabled"]
    code, output = run_ranks([*words, "--run-dir", str(run_dir)], num_ranks, config)
    assert code == 0, output
    return checkpoint(run_dir, 4)


@pytest.mark.parametrize("config", ["cpu", "deepspeed_zero2", "deepspeed_zero3"])
def test_two_ranks_share_one_phi_on_a_flow_by_ddp_and_with_its_weights_in_shards(on_one_rank, tmp_path, config):
    """ZeRO 3 gathers the transformer's weights block by block; a run on it is stopped and goes on."""
    found = on_ranks(tmp_path / "run", 2, config)
    assert relative_difference(parameters(on_one_rank), parameters(found)) < 1e-3
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "update_00000004")
    assert relative_difference(found, on_ranks(tmp_path / "run", 2, config, resumed=True)) < 1e-5
