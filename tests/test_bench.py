"""`dist-vsd bench scaling`: its ratios by hand-computed numbers, real smallest runs, and what it refuses."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from dist_vsd.commands.bench import run
from dist_vsd.commands.bench_output import BUSY_CORES
from dist_vsd.errors import RunFailed
from dist_vsd.scaling import measure
from dist_vsd.scaling.efficiency import comparisons, efficiency, jobs_of, make_rows, weak_efficiency
from dist_vsd.scaling.machine import OtherPrograms, Places, physical_cores
from dist_vsd.scaling.measure import (
    Job,
    RunSizes,
    Settings,
    Timing,
    mean_timing,
    require_success,
    run_environment,
    summarize,
    train_command,
)
from dist_vsd.scaling.pinned import core_of
from tests.runs import environment
from tests.warm_python import python

TINY_FIELD = ["--field.dense-grid.resolutions", "8", "16", "--field.num-samples", "8", "--field.occupancy-every", "2"]
TWO_CORES = Places("core", ("0", "1"))
SETTINGS = Settings(prompt="a duck", words=("--preset", "embedded"), num_updates=4, num_warmup=1)
SIZES = RunSizes(1000, 100, 4000, num_views=1, micro_batch_size=4, steps_per_update=1)


def line(update, seconds, phi=0.0, **others):
    return {"update": update, "seconds/update": seconds, "seconds/render": seconds / 4, "seconds/phi": phi} | others


def timing(seconds, sent=None, memory=None):
    return Timing(seconds, {"render": seconds / 2, "scores": seconds / 4, "backward": 0.0, "phi": seconds / 8}, sent, memory)


def rows_of(seconds):
    """Return rows of a measurement on two cores, of seconds by job and repeat."""
    compared = comparisons((1, 2, 4), 1, 4, num_places=2)
    timings = {job: [timing(s) for s in seconds[job]] for job in jobs_of(compared)}
    return make_rows(compared, timings, dict.fromkeys(timings, SIZES), SETTINGS, num_places=2)


SECONDS = {
    Job(1, 1): [1.0, 2.0, 1.2],
    Job(2, 2): [1.25, 2.0, 2.0],
    Job(4, 4): [2.0, 8.0, 4.0],
    Job(1, 1, num_runs=2): [1.25, 1.6, 1.5],
    Job(1, 4): [4.0, 4.0, 5.0],
    Job(2, 4): [2.5, 2.0, 2.5],
}


def row(rows, mode, num_ranks):
    return next(r for r in rows if r["mode"] == mode and r["num_ranks"] == num_ranks)


def test_weak_efficiency_compares_equal_work_of_a_rank_and_strong_equal_work_in_all():
    assert efficiency("weak", 4, 1.0, 1.25) == efficiency("control", 4, 1.0, 1.25) == 0.8
    assert efficiency("strong", 4, 1.0, 0.25) == 1.0
    assert efficiency("strong", 2, 1.0, 1.0) == 0.5


def test_an_efficiency_is_the_median_of_ratios_within_a_repeat_not_a_ratio_of_medians():
    rows = rows_of(SECONDS)
    weak, strong = row(rows, "weak", 2), row(rows, "strong", 2)
    assert [r["efficiency"] for r in weak["repeats"]] == [0.8, 1.0, 0.6]
    assert weak["efficiency"] == 0.8  # the ratio of the medians would be 1.2 / 2.0
    assert weak["seconds_per_update"] == 2.0
    assert [r["efficiency"] for r in strong["repeats"]] == [0.8, 1.0, 1.0]
    assert row(rows, "weak", 1)["efficiency"] == row(rows, "strong", 1)["efficiency"] == 1.0


def test_weak_scaling_is_taken_apart_into_sharing_the_machine_and_synchronisation():
    weak = weak_efficiency(rows_of(SECONDS))
    assert weak["2"] == {"plain": 0.8, "control": 0.8, "synchronisation": 0.8, "cores_shared": False}
    assert weak["4"] == {"plain": 0.3, "control": None, "synchronisation": None, "cores_shared": True}


def test_rows_with_more_ranks_than_cores_are_marked_and_have_no_control():
    rows = rows_of(SECONDS)
    assert {(r["mode"], r["num_ranks"] * r["num_runs"]): r["cores_shared"] for r in rows} == {
        ("weak", 1): False, ("weak", 2): False, ("weak", 4): True, ("control", 2): False,
        ("strong", 1): False, ("strong", 2): False, ("strong", 4): True,
    }  # fmt: skip


def test_a_run_that_stands_in_two_rows_is_made_once():
    compared = comparisons((4, 1, 2), 1, 4, num_places=2)
    assert compared.count(("weak", Job(4, 4))) == compared.count(("strong", Job(4, 4))) == 1
    assert jobs_of(compared) == [Job(1, 1), Job(2, 2), Job(4, 4), Job(1, 1, num_runs=2), Job(1, 4), Job(2, 4)]


def test_an_update_counts_by_the_median_after_the_warmup():
    lines = [line(1, 9.0), line(2, 0.4, phi=0.2), line(3, 0.2), line(4, 0.4, phi=0.2), line(5, 3.0)]
    found = summarize(lines, num_warmup=1)
    assert found.seconds_per_update == 0.4
    # The middle half is both updates of 0.4 seconds.
    assert found.stages == pytest.approx({"render": 0.1, "scores": 0.0, "backward": 0.0, "phi": 0.2})


def test_stages_sum_to_no_more_than_the_update_where_their_medians_would():
    lines = [{"update": i, "seconds/update": 1.0, "seconds/render": i % 2, "seconds/phi": (i + 1) % 2} for i in (1, 2, 3, 4)]
    lines += [{"update": 5, "seconds/update": 2.0, "seconds/render": 1.0, "seconds/phi": 1.0}]
    found = summarize(lines, num_warmup=0)  # the median of either stage is 1
    assert sum(found.stages.values()) <= found.seconds_per_update == 1.0


def test_bytes_and_memory_are_reported_where_the_run_does_and_left_open_otherwise():
    assert summarize([line(1, 1.0)], 0) == Timing(1.0, {"render": 0.25, "scores": 0.0, "backward": 0.0, "phi": 0.0}, None, None)
    sent = {"communication/sent_mib": 0.5, "memory/peak_mib": 700.0}
    found = summarize([line(1, 1.0, **{"memory/peak_mib": 900.0}), line(2, 1.0, **sent), line(3, 1.0, **sent)], num_warmup=1)
    assert (found.sent_bytes_per_update, found.peak_memory_mib) == (2**19, 900.0)


def test_several_runs_at_once_count_by_their_mean_and_the_largest_memory():
    found = mean_timing([timing(1.0, sent=0.0, memory=10.0), timing(3.0, sent=0.0, memory=30.0)])
    assert (found.seconds_per_update, found.stages["phi"], found.peak_memory_mib) == (2.0, 0.25, 30.0)


def test_a_run_without_an_update_after_the_warmup_is_no_measurement():
    with pytest.raises(RunFailed, match="no update after the first 3"):
        summarize([line(1, 1.0), line(3, 1.0)], num_warmup=3)


def test_ranks_take_a_core_each_and_begin_again_where_there_are_too_few():
    assert [core_of(rank, "3,5") for rank in range(4)] == [3, 5, 3, 5]
    assert [TWO_CORES.environment(i)["DIST_VSD_CORES"] for i in range(2)] == ["0,1", "1,0"]
    assert Places("GPU", ("4", "6")).environment(1) == {"CUDA_VISIBLE_DEVICES": "6,4"}


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux binds a process to cores")
def test_a_pinned_process_stays_on_its_core():
    core = physical_cores(os.sched_getaffinity(0))[-1]
    words = "import os; from dist_vsd.scaling.pinned import pin; pin(); print(os.sched_getaffinity(0))"
    variables = environment() | {"DIST_VSD_CORES": str(core), "LOCAL_RANK": "0"}
    assert subprocess.run([sys.executable, "-c", words], env=variables, capture_output=True, text=True).stdout == f"{{{core}}}\n"


def test_a_run_has_one_thread_a_rank_and_nothing_of_a_launcher_around_it():
    made = run_environment({"RANK": "1", "OMP_NUM_THREADS": "8", "HOME": "/h"}, {"DIST_VSD_CORES": "0"})
    assert (made["OMP_NUM_THREADS"], made["DIST_VSD_CORES"], made["HOME"]) == ("1", "0", "/h")
    assert "RANK" not in made


def test_one_rank_starts_alone_and_several_by_accelerate(tmp_path):
    alone = train_command(Job(1, 2), SETTINGS, tmp_path / "run", tmp_path / "launcher.yaml")
    several = train_command(Job(2, 2), SETTINGS, tmp_path / "run", tmp_path / "launcher.yaml")
    assert alone[1:3] == ["-m", "dist_vsd.scaling.pinned"]
    assert several[1:5] == ["-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "launcher.yaml")]
    assert alone[alone.index("train") :] == several[several.index("train") :]


def test_a_refused_run_tells_its_line_and_a_broken_one_the_end_of_its_output():
    with pytest.raises(ValueError, match="^seed must be 0 or more$"):
        require_success(Job(1, 1), 2, "noise\ndist-vsd: error: seed must be 0 or more\n")
    with pytest.raises(RunFailed, match=r"2 rank\(s\), 2 particle\(s\) ended with exit code 1: the disk is full"):
        require_success(Job(2, 2), 1, "Traceback\ndist-vsd: failed: the disk is full\nlauncher's words\n")
    with pytest.raises(RunFailed, match=r"exit code -9: b \| c \| d$"):
        require_success(Job(1, 1), -9, "a\nb\n\nc\nd\n")


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="only Linux says how busy the cores are")
def test_own_work_is_not_taken_for_that_of_other_programs():
    others = OtherPrograms()
    sum(i * i for i in range(3_000_000))
    assert 0 <= others.cores() <= os.cpu_count()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The record of a real smallest measurement: three runs, four processes."""
    out = tmp_path_factory.mktemp("bench")
    words = ["scaling", "--ranks", "1", "2", "--strong-particles", "0", "--num-updates", "5", "--num-warmup", "2", "--repeats", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", python())  # which it starts
        patch.setenv("HF_HUB_OFFLINE", "1")
        assert run([*words, "--out", str(out), "--", *TINY_FIELD]) == 0
    assert (out / "scaling.png").exists() == (importlib.util.find_spec("matplotlib") is not None)
    return json.loads((out / "scaling.json").read_text())


def test_a_real_measurement_has_a_row_for_each_run(measured):
    rows = [(r["mode"], r["num_ranks"], r["num_runs"], r["num_particles"]) for r in measured["rows"]]
    control = [("control", 1, 2, 1)] if len(physical_cores(os.sched_getaffinity(0))) > 1 else []
    assert rows == [("weak", 1, 1, 1), ("weak", 2, 1, 2), *control]
    assert measured["train_words"] == TINY_FIELD


def test_the_stages_of_a_real_update_are_most_of_it_and_no_more(measured):
    for found in measured["rows"]:
        assert all(seconds > 0 for seconds in found["stages"].values()), found
        # The rest is the agreement on stopping, and what Python does between the stages.
        assert 0.5 * found["seconds_per_update"] < sum(found["stages"].values()) <= found["seconds_per_update"] * (1 + 1e-9)


def test_the_efficiency_of_a_real_measurement_follows_from_its_repeats(measured):
    one, two = measured["rows"][:2]
    assert two["efficiency"] == one["repeats"][0]["seconds_per_update"] / two["repeats"][0]["seconds_per_update"]
    assert measured["weak_efficiency"]["2"]["plain"] == two["efficiency"]


def test_sizes_of_a_real_run_are_counted_from_its_files(measured):
    for found in measured["rows"]:
        # Two grids of 8^3 and 16^3 points with a density and three colours each, and the background's few numbers.
        assert found["theta_numbers"] - 4 * (8**3 + 16**3) in range(500)
        assert found["phi_numbers"] > 1000
        assert found["prior_bytes"] > 2**22  # fp32; the files are fp16


def fake_job(seconds_of):
    """Return a stand-in for run_job that takes no time."""
    return lambda job, settings, places, folder: (timing(seconds_of[job], sent=2.0**20, memory=500.0), SIZES)


def test_the_table_says_what_was_measured_and_what_was_not(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "run_job", fake_job({job: seconds[0] for job, seconds in SECONDS.items()}))
    monkeypatch.setattr(Places, "of_this_machine", lambda num_gpus: TWO_CORES)
    assert run(["scaling", "--repeats", "2", "--out", str(tmp_path / "new" / "folder")]) == 0
    printed = capsys.readouterr()
    assert "0.80 (0.80-0.80)" in printed.out
    assert printed.out.count("ranks share cores") == 3  # two rows, and the sentence on four ranks
    assert "2 ranks: efficiency 0.80; 2 independent runs at once keep 0.80, and synchronisation 1.00 of that" in printed.out
    assert "run 12/12: 2 rank(s), 4 particle(s): 2.500 s an update" in printed.err
    assert len(json.loads((tmp_path / "new" / "folder" / "scaling.json").read_text())["rows"]) == 7


@pytest.mark.parametrize("cores", [None, 0.9 * BUSY_CORES, 1.5])
def test_other_programs_are_mentioned_when_they_were_busy(cores, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "run_job", fake_job({Job(1, 1): 1.0}))
    monkeypatch.setattr(OtherPrograms, "cores", lambda self: cores)
    run(["scaling", "--ranks", "1", "--strong-particles", "0", "--repeats", "1", "--out", str(tmp_path)])
    assert ("other programs used 1.5 cores" in capsys.readouterr().out) == (cores == 1.5)
    assert json.loads((tmp_path / "scaling.json").read_text())["cores_used_by_other_programs"] == cores


def test_without_matplotlib_there_is_a_table_and_a_line_that_says_what_installs_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "run_job", fake_job({Job(1, 1): 1.0}))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "dist_vsd.scaling.plots", raising=False)
    assert run(["scaling", "--ranks", "1", "--strong-particles", "0", "--out", str(tmp_path)]) == 0
    assert "pip install dist_vsd[bench]" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["scaling.json"]


BAD = {
    "scalin": ("bench 'scalin' does not exist (did you mean scaling?)",),
    "scaling --ranks 0 1": ("--ranks must be numbers of at least 1", "0 1"),
    "scaling --ranks 1 2 2": ("each once", "1 2 2"),
    "scaling --ranks 2 4": ("--ranks must hold 1", "2 4", "add 1"),
    "scaling --ranks one": ("--ranks", "one"),
    "scaling --repeats 0": ("--repeats must be at least 1, got 0",),
    "scaling --particles-per-rank 0": ("--particles-per-rank must be at least 1, got 0",),
    "scaling --num-updates 0": ("--num-updates must be at least 1, got 0",),
    "scaling --num-updates 10 --num-warmup 10": ("below --num-updates, got 10 of 10", "change one"),
    "scaling --num-warmup -1": ("--num-warmup must be 0 or more", "-1"),
    "scaling --strong-particles 2": ("at least the most ranks, 4", "got 2"),
    "scaling --strong-particles -1": ("--strong-particles", "got -1"),
    "scaling --preset embeded": ("preset 'embeded' does not exist (did you mean embedded",),
    "scaling --prior nowhere": ("prior 'nowhere' is not a folder",),
    "scaling --prompt dragon": ("does not know 'dragon'",),
    "scaling --repeat 3": ("--repeats", "dist-vsd bench scaling --help"),
    "scaling --out file": ("--out 'file' can't be written", "is a file", "choose another"),
    "scaling -- --num_updates 3": ("--num-updates can't stand after --", "bench's own --num-updates"),
    "scaling -- --run-dir=here": ("--run-dir can't stand after --", "temporary"),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_told_in_a_line_and_nothing_is_written(words, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("taken")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as told:  # noqa: PT011 - the message is checked below
        run(words.split())
    assert all(part in str(told.value) for part in BAD[words]), told.value
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_words_that_train_refuses_are_told_in_its_own_line_and_nothing_is_written(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"score.rank must be at least 1, got 0"):
        run(["scaling", "--ranks", "1", "--strong-particles", "0", "--out", str(out), "--", "--score.rank", "0"])
    assert not out.exists()


def test_a_launcher_around_bench_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="run it without the launcher"):
        run(["scaling"])
