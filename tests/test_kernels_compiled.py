"""kernels/compiled.py: Triton's compiler takes every kernel for every kind of GPU, on a machine without one."""

import importlib

import pytest
import torch

from dist_vsd.cameras import turntable
from dist_vsd.kernels.choice import served_by
from dist_vsd.kernels.compiled import FILES, TARGETS, compiled, kernels
from dist_vsd.kernels.compositing import accumulate, composite, visible
from dist_vsd.kernels.hash_encoding import hash_encode
from dist_vsd.rasterization.rasterize import coverage, rasterize
from tests.each_kernel import NEEDS_TRITON, random_samples

NAMES = [
    "sampling/count", "sampling/write", "hash_encoding/encode", "hash_encoding/gradient",
    "compositing/forward", "compositing/backward", "compositing/visible", "compositing/sum",
    "rasterization/paint", "silhouettes/cross",
]  # fmt: skip


@NEEDS_TRITON
def test_every_kernel_is_among_those_that_are_compiled():
    assert list(kernels()) == NAMES


@NEEDS_TRITON
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_compiles_and_leaves_room_for_others(name, target, tmp_path, monkeypatch):
    """Nothing is spilled; at 48 registers a thread ten programs of 128 threads share a multiprocessor, at 56 nine."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with served_by("triton"):
        random_samples(1, 2, 2, 4)  # the interpreter before leaves the compiler's language as it was
    found = compiled(name, target)
    assert (found.name, found.target) == (name, target)
    assert found.spilled_bytes == 0
    assert 0 < found.registers <= (56 if name == "silhouettes/cross" else 48)  # by Triton 3.7 it takes 53, by 3.9 it takes 40
    assert 0 <= found.shared_bytes <= 2048


@NEEDS_TRITON
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_compiles_for_one_of_everything(name, tmp_path, monkeypatch):
    """A launch takes the number 1 for a constant, which knows less than a number of the device."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert compiled(name, 90, ones=True).registers > 0


class GpuOnPaper:
    """What Triton's launcher asks of a driver before it compiles."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def launch_all(size):
    """Call every function that launches kernels, for as many rays as samples on a ray."""
    samples = random_samples(1, size, size, size * size)
    density, table = torch.ones_like(samples.t, requires_grad=True), torch.ones(8, 1, requires_grad=True)
    found = composite(density, torch.ones_like(samples.t)[:, None].expand(-1, 3), visible(density, samples, size * size))
    (accumulate(found.weights, samples).sum() + found.color.sum()).backward()
    hash_encode(torch.zeros(size, 3), [table], [1], samples.count).sum().backward()
    corners = torch.eye(3) if size > 1 else torch.zeros(1, 3)
    coverage(rasterize(corners, torch.arange(len(corners)).expand(size, 3), turntable(min(size, 2), 0.0, 3.0, 40.0), size))


def kinds_of(signature):
    """Return the types of arguments that are not constants; a launch takes whole numbers that fit into 32 bits for such."""
    return {name: kind.replace("i64", "i32") for name, kind in signature.items() if kind != "constexpr"}.items()


@NEEDS_TRITON
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU launches for real, in the other files")
@pytest.mark.parametrize("size", [1, 2, 20])
def test_what_the_functions_launch_is_what_is_compiled(size, tmp_path, monkeypatch):
    """Up to the launch itself, by Triton's own launcher: arguments, their types, constants and options; then in the interpreter."""
    from triton.runtime import driver

    from dist_vsd.kernels import launch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", GpuOnPaper())
    launched = {}

    def warmed_up(kernel, grid, *arguments, num_warps=4, **constants):
        found = kernel.warmup(*arguments, grid=grid, **constants, num_warps=num_warps, **launch.OPTIONS)
        launched[kernel.__name__] = kinds_of(found.src.signature)
        launch.launch(kernel, grid, *arguments, **constants)

    for file in FILES:
        monkeypatch.setattr(f"dist_vsd.kernels.{file}_triton.launch", warmed_up)
    with served_by("triton"):
        launch_all(size)
    for file, kernel in kernels().values():
        signature = importlib.import_module(f"dist_vsd.kernels.{file}_triton").SIGNATURES[kernel][0]
        assert launched.pop(kernel) <= kinds_of(signature)
    assert not launched
