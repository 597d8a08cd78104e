"""kernels/compiled.py: Triton's compiler takes every kernel for every kind of GPU, on a machine without one."""

import pytest

from dist_vsd.kernels.compiled import TARGETS, compiled, kernels
from tests.both_kernels import NEEDS_TRITON, random_samples, served_by

NAMES = [
    "sampling/count", "sampling/write", "hash_encoding/encode", "hash_encoding/gradient",
    "compositing/forward", "compositing/backward", "compositing/visible", "compositing/sum",
]  # fmt: skip


@NEEDS_TRITON
def test_every_kernel_is_among_those_that_are_compiled():
    assert list(kernels()) == NAMES


@NEEDS_TRITON
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_compiles_and_leaves_room_for_others(name, target, tmp_path, monkeypatch):
    """Nothing is spilled; at 48 registers a thread ten programs of 128 threads share a multiprocessor."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with served_by("triton"):
        random_samples(1, 2, 2, 4)  # the interpreter before leaves the compiler's language as it was
    found = compiled(name, target)
    assert (found.name, found.target) == (name, target)
    assert found.spilled_bytes == 0
    assert 0 < found.registers <= 48
    assert 0 <= found.shared_bytes <= 2048


@NEEDS_TRITON
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_compiles_for_one_of_everything(name, tmp_path, monkeypatch):
    """A launch takes the number 1 for a constant, which knows less than a number of the device."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert compiled(name, 90, ones=True).registers > 0
