"""Compiled networks: the plain ones' numbers and gradients, what was compiled found again, and refusals of what is not there."""

import os
import shutil

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

from dist_vsd.commands.info import run as info
from dist_vsd.commands.train import check_start
from dist_vsd.config import RunConfig
from dist_vsd.priors import compile_names, compiled
from dist_vsd.priors.compile_names import require_compile
from dist_vsd.priors.cuda_graphs import Graphed
from dist_vsd.priors.table import PRIORS, load_prior, prior_row
from dist_vsd.score.lora_score import LoraScore
from dist_vsd.score.score_config import ScoreConfig
from tests.ranks import run_ranks
from tests.runs import TINY, checkpoint
from tests.two_views import ROW
from tests.warm_python import Process


@pytest.fixture
def traced(monkeypatch):
    """Take blocks apart and join forward and backward as for the compiler, but run torch's own operations: C++ takes minutes."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()


def answers(way, dtype=torch.float32, recompute=False, own_network=False):
    """Return what prior, phi and encoder say of two latents and two pictures, without a gradient and with it, and all gradients."""
    prior = load_prior("random:tiny", "cpu", dtype, compiled=way)
    network = prior.network_of("random:tiny") if own_network else prior.network
    score = LoraScore(network, ScoreConfig(recompute=recompute), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in score.phi().items():
            parameter.add_(0.1 if "lora_B" in name else 0.0)
    generator = torch.Generator().manual_seed(1)
    x_t, t, pose = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([20, 700]), torch.ones(2, 16)
    image = torch.rand(2, 3, prior.image_size, prior.image_size, generator=generator).requires_grad_()
    y = prior.embed(["a duck", "a car"]).cond
    with torch.no_grad():
        before, of_phi = prior.predict(x_t, t, y), score(x_t, t, y, pose)
    prior.encode(image).square().sum().backward()
    predicted = score(x_t, t, y, pose)
    predicted.square().sum().backward()
    with torch.no_grad():
        assert torch.equal(prior.predict(x_t, t, y), before)  # phi has not changed the prior
    return [before, of_phi, predicted.detach(), image.grad, *(parameter.grad for parameter in score.phi().values())]


def check_close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("options", [{}, {"recompute": True, "own_network": True}], ids=["as it is", "recompute, own network"])
def test_regions_give_the_plain_networks_numbers_and_gradients(traced, options):
    """With LoRA and without, to the rounding of fp32 sums; and the same bits again."""
    found = answers("regions", **options)
    check_close(found, answers("off", **options), 1e-4)
    assert all(map(torch.equal, found, answers("regions", **options)))


def test_regions_in_bf16_are_as_near_to_fp32_as_the_plain_networks(traced):
    """A region keeps fp32 between operations that it joins, so that they differ from each other by as much as both round."""
    exact, plain, found = answers("off"), answers("off", torch.bfloat16), answers("regions", torch.bfloat16)

    def error(of):
        return sum(float((one.float() - other).norm() / other.norm()) for one, other in zip(of, exact, strict=True) if other.any())

    assert error(found) < 1.2 * error(plain)


def compile_a_block(folder, results):
    """Compile the transformer block in the middle, for what a pass of the prior without a gradient takes, by the real compiler."""
    os.environ[compiled.FOLDER] = folder
    compiled.REGIONS = (BasicTransformerBlock,)
    prior = load_prior("random:tiny")
    compiled.compile_regions(prior.unet.mid_block)
    y = prior.embed(["a duck"]).cond
    with torch.no_grad():
        predicted = prior.predict(torch.ones(1, 4, 8, 8), torch.tensor([500]), y)
        plain = load_prior("random:tiny").predict(torch.ones(1, 4, 8, 8), torch.tensor([500]), y)
    torch.testing.assert_close(predicted, plain, rtol=1e-4, atol=1e-4)
    found = compiled.compilations
    with open(results, "a") as file:
        file.write(f"{found.compiled} {found.found} {len(found.news())} {len(found.news())}\n")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_what_was_compiled_is_found_by_the_next_process_and_told_once(tmp_path):
    for _ in range(2):
        process = Process(compile_a_block, str(tmp_path / "compiled"), str(tmp_path / "results"))
        process.join(300)
        assert process.exitcode == 0
    first, second = ([int(word) for word in line.split()] for line in (tmp_path / "results").read_text().splitlines())
    assert first[0] > 0
    assert (first[1], second[:2]) == (0, [0, first[0]])
    assert first[2:] == second[2:] == [1, 0]


def aot_eager():
    compiled.BACKEND = "aot_eager"


def test_two_ranks_train_phi_through_regions_as_plainly(tmp_path):
    """By DDP; phi and particles to rounding, which Adam's first steps make larger."""
    results = {}
    for name, way in {"plain": "off", "compiled": "regions"}.items():
        arguments = ["a duck", "--prior", "random:tiny", "--render-size", "16", *TINY, "--num-updates", "2", "--checkpoint-every", "2"]
        run = [*arguments, "--num-particles", "2", "--run-dir", str(tmp_path / name), "--compile", way]
        code, text = run_ranks(run, 2, extension="tests.test_compiled:aot_eager")
        assert code == 0, text
        results[name] = checkpoint(tmp_path / name, 2)
    for key, expected in results["plain"].items():
        torch.testing.assert_close(results["compiled"][key], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_is_not_there_is_refused_in_one_line_that_says_what_to_do(monkeypatch, capsys):
    with pytest.raises(ValueError, match="compile 'graphs' can't be used: CUDA graphs want a GPU.*leave --compile out") as error:
        require_compile("graphs", False)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"torch finds no C\+\+ compiler \(no-such-compiler\): install g\+\+"):
        require_compile("regions", False)
    assert info([]) == 0
    assert "compile regions: torch finds no C++ compiler" in capsys.readouterr().out


def test_the_deterministic_mode_takes_no_kernels_that_a_gpu_has_chosen_by_trial(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compile_names, "why_not_compiled", lambda _way: "")
    require_compile("regions", False)
    require_compile("off", True)
    with pytest.raises(ValueError, match="--deterministic promises the same bits"):
        require_compile("regions", True)


def test_a_prior_that_can_not_be_compiled_says_so(monkeypatch):
    monkeypatch.setitem(PRIORS, "two_views", ROW)
    with pytest.raises(ValueError, match="compile must be off for this prior, got 'regions'"):
        require_compile("regions", False, prior_row("two-views").compiles)


def test_zero_3_is_refused():
    class Process:
        zero_stage, device = 3, torch.device("cpu")

    with pytest.raises(ValueError, match="--compile can't go with ZeRO 3.*use ZeRO 2"):
        check_start(RunConfig(prompt="a duck", compile="regions"), Process())


def test_a_function_on_the_cpu_is_not_recorded():
    graphed = Graphed(torch.sin)
    with torch.no_grad():
        assert torch.equal(graphed(torch.ones(2)), torch.ones(2).sin())
    assert not graphed._recorded


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_graphs_follow_their_inputs_and_their_weights():
    weight = torch.randn(8, 8, device="cuda")
    graphed = Graphed(lambda x, y: x @ weight if y is None else x @ weight + y)
    with torch.no_grad():
        for _ in range(3):
            x, y = torch.randn(4, 8, device="cuda"), torch.randn(4, 8, device="cuda")
            weight += 1
            for inputs in ((x, None), (x, y)):
                expected = x @ weight + (0 if inputs[1] is None else y)
                torch.testing.assert_close(graphed(*inputs), expected, rtol=1e-5, atol=1e-5)
    assert len(graphed._recorded) == 2
    assert graphed(x.requires_grad_(), None).requires_grad
