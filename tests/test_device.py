"""device.py: on a CPU copies are done when they return; on a GPU they travel beside the computation and neither overtakes the other."""

import mmap
import os

import numpy as np
import psutil
import pytest
import torch

from dist_vsd.device import SideStream, best_device, is_accelerator, peak_memory_mib, synchronize, use_fixed_order

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="copies beside the computation need a GPU")


def test_on_a_cpu_everything_is_done_when_it_returns():
    copies, tensor = SideStream(CPU), torch.arange(3.0)
    with copies.queued():
        brought, home = copies.brought(tensor), copies.home_for(tensor)
        copies.take_home(brought * 2, home)
    copies.wait_for_computation()
    copies.let_computation_wait(copies.mark())
    copies.synchronize()
    assert torch.equal(home, 2 * tensor)
    assert brought.data_ptr() != tensor.data_ptr()
    assert not home.is_pinned()


def test_peak_memory_is_that_of_this_process():
    before = peak_memory_mib(CPU)
    below = before - psutil.Process().memory_info().rss / 2**20  # tests before this one may have held much more than is held now
    pages = mmap.mmap(-1, (int(below) + 256) * 2**20)  # new ones, where an allocator gives back what it has kept
    np.frombuffer(pages, np.uint8)[::4096] = 1
    assert 100 < before < peak_memory_mib(CPU) < before + 1000


def test_only_what_works_beside_the_cpu_is_waited_for():
    assert [is_accelerator(torch.device(name)) for name in ("cpu", "meta", "cuda")] == [False, False, True]
    synchronize(CPU)
    assert best_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("users", "expected"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_a_fixed_order_is_torchs_deterministic_mode_with_what_cublas_wants_for_it(users, expected, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # monkeypatch puts back what was there
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    if users:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", users)
    try:
        use_fixed_order()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected
    finally:
        torch.use_deterministic_algorithms(False)


@needs_gpu
def test_on_a_gpu_copies_and_computation_wait_for_one_another():
    device = best_device()
    copies, host = SideStream(device), torch.arange(2.0**22).pin_memory()
    for _ in range(20):
        with copies.queued():
            brought = copies.brought(host)
            mark = copies.mark()
        copies.let_computation_wait(mark)
        doubled = brought * 2
        home = copies.home_for(doubled)
        copies.wait_for_computation()
        with copies.queued():
            copies.take_home(doubled, home)
        del brought, doubled
        copies.synchronize()
        assert torch.equal(home, 2 * host)
