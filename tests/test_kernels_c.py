"""Kernels in C: compiled once for a user, by whatever compiler there is, and done without where there is none."""

import subprocess

import pytest
import torch

from dist_vsd.kernels import c_kernels
from dist_vsd.kernels.choice import implementation, kernels_in_words, served_by
from dist_vsd.kernels.two_layers import two_layers
from tests.each_kernel import NEEDS_C

CPU = torch.device("cpu")


@pytest.fixture
def anew(tmp_path, monkeypatch):
    """Let them be compiled as by a new process, into a cache of their own."""
    monkeypatch.setenv("DIST_VSD_CACHE", str(tmp_path))
    monkeypatch.delenv("DIST_VSD_KERNELS", raising=False)

    def forget():
        c_kernels._library.cache_clear()
        c_kernels.lacking.cache_clear()

    forget()
    yield forget
    forget()


@NEEDS_C
def test_what_was_compiled_is_kept_and_found_by_the_next_process(anew, tmp_path, monkeypatch):
    assert c_kernels.lacking() == ""
    (kept,) = (tmp_path / "kernels").iterdir()
    anew()
    monkeypatch.setattr(c_kernels.subprocess, "run", pytest.fail)
    assert c_kernels.lacking() == ""
    assert list((tmp_path / "kernels").iterdir()) == [kept]


@NEEDS_C
def test_another_compiler_or_processor_has_a_file_of_its_own(anew, tmp_path, monkeypatch):
    for processor in ("one", "other"):
        monkeypatch.setattr(c_kernels, "_processor", lambda name=processor: name)
        anew()
        assert c_kernels.lacking() == ""
    assert len(list((tmp_path / "kernels").iterdir())) == 2


@NEEDS_C
def test_a_cache_that_can_not_be_written_is_done_without(anew, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIST_VSD_CACHE", str(tmp_path / "file"))
    assert c_kernels.lacking() == ""


def test_without_a_compiler_plain_torch_serves_and_it_is_said(anew, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(c_kernels.shutil, "which", lambda _name: None)
    assert implementation(CPU) == "torch"
    assert kernels_in_words(CPU) == "plain torch, as no C compiler is found: install gcc"


@pytest.mark.parametrize(("compiler", "said"), [("false", "the C compiler false fails: "), ("no-such-compiler", "No such file")])
def test_a_compiler_that_fails_is_named_and_leaves_nothing_behind(anew, tmp_path, monkeypatch, compiler, said):
    monkeypatch.setenv("CC", compiler)
    assert said in c_kernels.lacking()
    assert "\n" not in c_kernels.lacking()
    assert implementation(CPU) == "torch"
    assert not list((tmp_path / "kernels").iterdir())


@NEEDS_C
def test_the_source_has_no_warnings(tmp_path):
    compiler = next(filter(c_kernels.shutil.which, c_kernels.COMPILERS))
    words = [compiler, *c_kernels.OPTIONS, "-Wall", "-Wextra", "-Werror", "-o", tmp_path / "made", c_kernels.SOURCE, "-lm"]
    subprocess.run(words, check=True)


@NEEDS_C
@pytest.mark.parametrize(("count", "width"), [(0, 32), (1, 32), (64, 7), (200, 32), (130, 1), (20, 300)])
def test_the_two_layers_of_a_field_give_the_numbers_and_gradients_of_plain_torch(count, width):
    """To the rounding of fp32 sums over points and widths; 300 is wider than C takes, and plain torch serves."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 12, generator=generator).requires_grad_()
    hidden, output = torch.nn.Linear(12, width), torch.nn.Linear(width, 4)
    cotangent, results = torch.randn(count, 4, generator=generator), []
    for kernels in ("torch", "c"):
        with served_by(kernels):
            y = two_layers(x, hidden, output)
            results.append([y.detach(), *torch.autograd.grad(y, [x, *hidden.parameters(), *output.parameters()], cotangent)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@NEEDS_C
def test_a_point_that_is_no_number_spoils_its_own_result_and_the_layers_gradients():
    x, hidden, output = torch.ones(70, 3), torch.nn.Linear(3, 8), torch.nn.Linear(8, 2)
    x[66, 1] = float("nan")
    y = two_layers(x, hidden, output)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [66]
    y.sum().backward()
    assert hidden.weight.grad.isnan().any()
