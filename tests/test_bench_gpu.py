"""benchmarks/gpu.py: the whole of it in small on a CPU; an item that fails, hangs or finds no time leaves the others alone."""

import json
import subprocess
import time

import pytest
import torch

from dist_vsd.kernels.choice import served_by
from tests.paper_device import DEVICE, OnPaper
from tests.runs import ROOT, environment
from tests.warm_python import python

SCRIPT = ROOT / "benchmarks" / "gpu.py"
PARTS = ("environment", "kernels", "updates", "promises", "waits", "speed")


@pytest.fixture
def items(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return pytest.importorskip("gpu_items")


def bench(*words):
    done = subprocess.run([python(), str(SCRIPT), *words], env=environment(), capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


def test_all_of_it_runs_in_small_on_a_cpu(tmp_path):
    """Every part; what wants a GPU says so."""
    code, printed, told = bench("--small", "--out", str(tmp_path / "gpu.json"))
    record = json.loads((tmp_path / "gpu.json").read_text())
    states = {f"{row['part']}: {row['name']}": (row["state"], row.get("reason", "")) for row in record["items"]}
    assert [name for name, (state, _) in states.items() if state in ("failed", "broke")] == [], (states, told[-2000:])
    assert code == 0
    assert tuple(dict.fromkeys(row["part"] for row in record["items"])) == PARTS
    reasons = {reason for state, reason in states.values() if state == "skipped"}
    assert all("GPU" in reason or "triton is not installed" in reason or "nobody to wait for" in reason for reason in reasons)
    assert {"commit", "machine", "gpu", "torch", "seconds"} <= record.keys()
    checks = [check for row in record["items"] for check in row.get("checks", [])]
    assert len(checks) > 15
    assert all(check["found"] <= check["bound"] for check in checks)
    figures = next(row for row in record["items"] if row["name"] == "sd21, 1 particle")["figures"]
    assert figures["updates/s"]["target"] == 12
    assert figures["counted memory, MiB"] > 0
    assert "target 12" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said where there is no GPU")
def test_without_a_gpu_it_ends_with_one_line_and_writes_nothing():
    results = ROOT / "benchmarks" / "results" / "gpu.json"
    before = results.read_bytes() if results.exists() else None
    code, printed, told = bench()
    assert (code, told) == (2, "")
    assert len(printed.splitlines()) == 1
    assert "--small" in printed
    assert (results.read_bytes() if results.exists() else None) == before


def test_an_item_ends_as_it_ended_and_never_takes_the_others_along(items):
    def broken():
        raise RuntimeError("a kernel\nfailed")

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def absent():
        raise items.Skipped("no GPU")

    def state(work, seconds=10.0, left=100.0, **more):
        row = items.run_item(items.Item("part", "name", seconds, work, **more), left)
        return row["state"], row.get("reason", "")

    assert state(lambda: {"figures": {"updates/s": 3.0}}) == ("measured", "")
    assert state(lambda: {"checks": [items.within("error", 1e-6, 1e-4)]}) == ("passed", "")
    assert state(lambda: {"checks": [items.within("error", 0.0, 0), items.within("error", float("nan"), 1e-4)]}) == ("failed", "")
    assert state(broken) == ("broke", "RuntimeError: a kernel failed")
    assert state(full)[0] == "broke"
    assert state(full, may_not_fit=True)[0] == "skipped"
    assert state(absent) == ("skipped", "no GPU")
    assert state(broken, seconds=10.0, left=4.0) == ("skipped", "its 10 s are more than the 4 s that were left")
    assert state(lambda: time.sleep(60), seconds=0.05) == ("broke", "OutOfTime: cut off after 0 s")


def test_what_was_done_is_written_after_every_item(items, tmp_path):
    gpu, out, seen = pytest.importorskip("gpu"), tmp_path / "gpu.json", []

    def look():
        seen.append(len(json.loads(out.read_text())["items"]) if out.exists() else 0)
        return {}

    gpu.run_items([items.Item("part", str(number), 1.0, look) for number in range(3)], {"items": []}, out, 60.0)
    assert seen == [0, 1, 2]
    assert len(json.loads(out.read_text())["items"]) == 3


@pytest.mark.parametrize("kind", ["random", "nasty"])
def test_on_a_device_that_is_not_the_cpu_the_kernels_items_find_no_tensor_in_the_wrong_place(items, kind):
    kernels, place = pytest.importorskip("gpu_kernels"), items.Place(DEVICE, True)
    for work in (kernels.sampling, kernels.compositing, kernels.leaving_out, kernels.hashing):
        with OnPaper(), served_by("torch"):
            checks = work(place, kind)
        assert checks
        assert [check for check in checks if not check["passed"]] == []


def test_neither_do_whole_updates_nor_fp16_that_overflows(items):
    updates, place = pytest.importorskip("gpu_updates"), items.Place(DEVICE, True)
    expected = updates.one_update(place, "latent", "fp32", torch.device("cpu"))
    with OnPaper(), served_by("torch"):
        found = updates.one_update(place, "latent", "fp32", DEVICE)
        overflow = updates.overflow(place)
        differences = {kind: items.relative_difference(found[kind], expected[kind]) for kind in expected}
    assert max(differences.values()) < updates.BOUNDS["fp32"] / 10
    assert all(check["passed"] for check in overflow["checks"])


def test_a_differing_bit_a_lost_tensor_and_a_nan_are_seen(items):
    runs = pytest.importorskip("gpu_runs")
    one = torch.ones(3)
    assert runs.same(one, one.clone())
    assert not runs.same(one, one + 1e-7)
    assert not runs.same(one, None)
    assert not items.within("error", float("nan"), 1.0)["passed"]
    assert items.relative_difference([one * 1.5], [one]) == pytest.approx(0.5)
