"""benchmarks/compare.py: the comparison of all objectives, in small, by the script that makes the README's tables."""

import json
import subprocess

import pytest

from tests.runs import ROOT, environment
from tests.warm_python import python

METHODS = {"denoising 7.5", "clip", "sds 7.5", "sds 30", "sds 100", "vsd 7.5"}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Run two parts of it; return a function that runs it again, and the folder."""
    folder = tmp_path_factory.mktemp("compare")

    def compare():
        words = ["benchmarks/compare.py", "--scale", "tiny", "--jobs", "1", "--out", str(folder)]
        words += ["--parts", "objects", "equal_time", "variety"]
        return subprocess.run([python(), *words], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True).stdout

    return compare, compare(), folder


def test_every_method_is_run_on_the_same_prompt_and_measured_by_the_same_instruments(compared):
    _, _, folder = compared
    results = json.loads((folder / "compare_tiny.json").read_text())
    table = results["objects"]["table"]
    assert table.keys() >= METHODS
    names = {frozenset(figures) for figures in table.values()}
    assert len(names) == 1
    assert {"clip/r_precision", "overlap/iou", "particles/diversity"} <= next(iter(names))
    assert {record["prompt"] for record in results["objects"]["records"]} == {"a red ball"}
    assert all(record["seconds_an_update"] > 0 for record in results["objects"]["records"])


def test_slower_methods_run_again_with_as_many_updates_as_the_baselines_time_allows(compared):
    _, _, folder = compared
    results = json.loads((folder / "compare_tiny.json").read_text())["equal_time"]
    times = results["relative_seconds"]
    timed = {record["method"]: record["update"] for record in results["records"]}
    assert times.keys() == METHODS
    assert times["sds 7.5"] == 1.0
    assert timed == {name: max(2, round(4 / ratio)) for name, ratio in times.items() if ratio > 1.1}
    assert all(updates <= 4 for updates in timed.values())


def test_sampling_the_prior_is_among_the_2d_methods_and_shows_the_object(compared):
    _, _, folder = compared
    table = json.loads((folder / "compare_tiny.json").read_text())["variety"]["table"]
    assert table["ancestral 7.5"]["recognition/object"][0] == 1.0


def test_the_tables_and_pictures_lie_beside_the_results_and_a_second_call_runs_nothing_again(compared):
    compare, first, folder = compared
    for name in ("compare_tiny.md", "compare_tiny.png", "compare_tiny_variety.png"):
        assert (folder / name).stat().st_size > 0
    before = (folder / "compare_tiny.json").read_text()
    again = compare()
    assert "done after" in first
    assert "done after" not in again
    assert json.loads(before)["objects"]["records"] == json.loads((folder / "compare_tiny.json").read_text())["objects"]["records"]
