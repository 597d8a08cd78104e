"""slurm/*.sbatch on a real Slurm: jobs that end, are preempted, run out of time, lose their node, or get nowhere.

Of what a job runs, `accelerate launch`, `dist-vsd sweep run` and `dist-vsd requeue` are the real ones; a rank, once started, goes on in a
process on its node that has imported the libraries before (warm_python.py): signals and kills reach it, and it dies with its node.
"""

import json
import re
import subprocess

import pytest
import torch

from tests.guide import lines_of, lines_of_head
from tests.ranks import run_ranks
from tests.runs import HUB_PRIOR, ROOT, SMALL, TINY, checkpoint
from tests.show_cluster import Show
from tests.warm_python import on_path, python
from tests.warm_server import FAULT

ENDLESS = ["--num-updates", "100000"]
# Jobs that go on until they are stopped, or have to last, rest in every update: they leave the cores to others.
RESTING = {FAULT: "rank_is_slow"}
# The guide's two lines for one run; its chapter on many is played whole, below.
ON_ONE_NODE, ON_TWO_NODES = (line.words for line in lines_of(ROOT / "docs" / "slurm.md", "One run"))
# Two null devices are a node's GPUs: torch sees none, and the ranks meet on gloo.
STUCK = """#!/bin/bash
mkdir -p stuck/checkpoints/update_00000005
echo '{"exit_code": 75, "update": 5, "attempt": "'"$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"'"}' > stuck/outcome.json
dist-vsd requeue 75 "a green duck" --run-dir stuck
"""


def submit(slurm, folder, script, run, *arguments, options=()):
    """Submit one of slurm/'s scripts for a run that rests; return the job's id."""
    return submit_line(slurm, folder, ["sbatch", *options, f"slurm/{script}", *arguments], run, [], RESTING)


def submit_line(slurm, folder, words, run, flags, variables=None):
    """Submit a run by the words of an sbatch line, for nodes of two GPUs, with further flags of `train`; return the job's id."""
    sbatch, *rest = words
    assert sbatch == "sbatch"
    variables = on_path() | (variables or {})
    return slurm.sbatch("--output=%j.log", "--gpus-per-node=2", *rest, *flags, "--run-dir", run, cwd=folder, environment=variables)


def submit_head(slurm, folder, script, run, prior):
    """Submit the line in the head of one of slurm/'s scripts, whole, for a small run on a random prior."""
    (line,) = lines_of_head(ROOT / "slurm" / script)
    return submit_line(slurm, folder, [prior if word == HUB_PRIOR else word for word in line.words], run, SMALL)


def outcome(folder, run):
    return json.loads((folder / run / "outcome.json").read_text())


def log(folder, job):
    file = folder / f"{job}.log"
    return file.read_text() if file.exists() else ""  # Slurm makes it as the job starts


def wait_for_update(slurm, folder, run, update, seconds=180):
    """Wait until a run has saved so many updates."""

    def saved():
        return any(int(file.parent.name[7:]) >= update for file in (folder / run / "checkpoints").glob("update_*/manifest.json"))

    slurm.wait_until(saved, seconds, f"update {update} of {run}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where jobs are submitted from: a disk that all nodes see."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "slurm").symlink_to(ROOT / "slurm")
    return folder


@pytest.fixture(scope="module")
def short(random_prior):
    """Flags of a small run of two particles; nothing here depends on what a prior has learned."""
    return ["--num-particles", "2", *TINY, "--prior", random_prior]


@pytest.fixture(scope="module")
def endless(short):
    """The words of a run that goes on until it is stopped."""
    return ["a green duck", *short, *ENDLESS]


@pytest.fixture(scope="module")
def slow_jobs(slurm, folder, endless):
    """Jobs that mostly wait; they begin before the other tests do, and take no GPU from them.

    A signal 90 seconds before a limit of two minutes would be due at once, perhaps before the script has its trap.
    """
    (folder / "stuck.sbatch").write_text(STUCK)
    stuck = slurm.sbatch("--output=%j.log", "--requeue", "--open-mode=append", folder / "stuck.sbatch", cwd=folder, environment=on_path())
    out_of_time = submit(slurm, folder, "train.sbatch", "timed", *endless, options=["--time=2", "--signal=B:USR1@60", "--gpus-per-node=0"])
    return {"stuck": stuck, "out of time": out_of_time}


def test_the_heads_line_for_one_node_uses_its_gpus_and_ends(slurm, slow_jobs, folder, random_prior):
    job = submit_head(slurm, folder, "train.sbatch", "one_node", random_prior)
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", log(folder, job)
    assert outcome(folder, "one_node") | {"error": ""} == {"exit_code": 0, "update": 1, "error": "", "attempt": f"{job}.0"}
    manifest = json.loads((folder / "one_node/checkpoints/update_00000001/manifest.json").read_text())
    assert manifest["world_size"] == 2


def test_the_heads_line_for_two_nodes_has_four_ranks_that_meet_over_the_network(slurm, folder, random_prior):
    job = submit_head(slurm, folder, "train_multi_node.sbatch", "two_nodes", random_prior)
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", log(folder, job)
    manifest = json.loads((folder / "two_nodes/checkpoints/update_00000001/manifest.json").read_text())
    assert manifest["world_size"] == 4
    assert outcome(folder, "two_nodes")["exit_code"] == 0


def test_a_job_that_runs_out_of_time_saves_and_is_requeued(slurm, slow_jobs, folder):
    """It began before the tests; asked for before one that preempts whatever runs."""
    job = slow_jobs["out of time"]
    slurm.wait_until(lambda: "resumed from update_" in log(folder, job), 180, "the job to go on")
    slurm.run("scancel", job)
    assert "the job goes back into the queue" in log(folder, job)


def test_a_preempted_run_is_requeued_and_ends_to_the_bit_where_an_undisturbed_one_does(slurm, folder, short):
    """By the guide's line for one node."""
    flags = [*short, "--num-updates", "24", "--checkpoint-every", "12"]
    job = submit_line(slurm, folder, ON_ONE_NODE, "preempted", flags, RESTING)
    slurm.wait_until(lambda: (folder / "preempted/metrics.jsonl").exists(), 120, "the first update")
    urgent = slurm.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1", cwd=folder)
    assert slurm.wait(urgent, "COMPLETED", "FAILED") == "COMPLETED"
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", log(folder, job)
    assert "the job goes back into the queue" in log(folder, job)
    assert "resumed from update_" in log(folder, job)
    assert outcome(folder, "preempted")["attempt"] == f"{job}.1"
    code, output = run_ranks(["a green duck", *flags, "--run-dir", str(folder / "undisturbed")], num_ranks=2)
    assert code == 0, output
    one, other = checkpoint(folder / "preempted", 24), checkpoint(folder / "undisturbed", 24)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_run_on_two_nodes_that_is_asked_to_stop_saves_on_all_ranks_and_is_requeued(slurm, folder, short):
    """By the guide's line for two nodes."""
    flags = [*short, "--num-particles", "4", *ENDLESS]
    job = submit_line(slurm, folder, ON_TWO_NODES, "asked", flags, RESTING)
    wait_for_update(slurm, folder, "asked", 4)
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
    slurm.wait_until(lambda: slurm.details(job)["Restarts"] == "1", 60, "the requeue")
    stopped = outcome(folder, "asked")
    slurm.run("scancel", job)
    assert (stopped["exit_code"], stopped["attempt"]) == (75, f"{job}.0")
    assert (folder / f"asked/checkpoints/update_{stopped['update']:08d}/manifest.json").exists()


def test_a_job_whose_node_dies_goes_on_from_its_checkpoint_on_another(slurm, folder, endless):
    job = submit(slurm, folder, "train.sbatch", "orphan", *endless)
    wait_for_update(slurm, folder, "orphan", 4)
    node = slurm.details(job)["NodeList"]
    slurm.lose(node)
    try:
        slurm.wait_until(lambda: "resumed from update_" in log(folder, job), 120, "the job to go on")
        assert slurm.details(job)["NodeList"] != node
    finally:
        slurm.run("scancel", job)
        slurm.start_node(node)


def test_a_refused_run_is_not_requeued(slurm, folder):
    job = submit(slurm, folder, "train.sbatch", "refused", "a green dragon", *TINY)
    assert slurm.wait(job, "COMPLETED", "FAILED") == "FAILED"
    assert "does not know 'dragon'" in log(folder, job)
    assert slurm.details(job)["Restarts"] == "0"
    assert not (folder / "refused").exists()


def test_a_job_that_makes_no_progress_in_three_starts_is_requeued_no_more(slurm, slow_jobs, folder):
    job = slow_jobs["stuck"]
    assert slurm.wait(job, "FAILED", "COMPLETED") == "FAILED"
    assert slurm.details(job)["Restarts"] == "3"
    assert log(folder, job).count("the job goes back into the queue") == 3
    assert "no progress in 3 starts (update 5 each time): not requeued" in log(folder, job)
    assert slurm.details(job)["ExitCode"] == "75:0"


def test_a_partition_that_does_not_exist_is_refused_in_one_line_and_nothing_is_submitted(slurm, folder):
    (folder / "p.txt").write_text("a green duck\n")
    variables = slurm.environment | on_path()

    def dist_vsd(*words):
        return subprocess.run(["dist-vsd", "sweep", *words], cwd=folder, env=variables, capture_output=True, text=True)

    assert dist_vsd("plan", "p.txt").returncode == 0
    refused = dist_vsd("submit", "sweeps/p", "--partition", "nowhere")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "partition 'nowhere'" in refused.stderr
    assert not list((folder / "sweeps/p").rglob("submissions/*"))


def test_the_lines_in_the_arrays_head_run(slurm, folder):
    """A sweep of one run in the place of eight; the head's sbatch line then starts it again, and finds it done."""
    variables = slurm.environment | on_path()
    (folder / "one.txt").write_text("a green duck\n")
    small = ["--set", "num_updates=1", "--set", "turntables=false", "--set", "field.dense_grid.resolutions=[8,16]"]
    subprocess.run(["dist-vsd", "sweep", "plan", "one.txt", *small], cwd=folder, env=variables, check=True, capture_output=True)
    replaced = {"SWEEP_DIR": "sweeps/one", "path/to/python": python(), "--array=0-7%4": "--array=0-0%4"}
    submitting, sbatch = lines_of_head(ROOT / "slurm" / "sweep_array.sbatch")
    for line, jobs_end in ((submitting, "done"), (sbatch, "done already")):
        words = [replaced.get(word, word.replace("SWEEP_DIR", "sweeps/one")) for word in line.words]
        done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (job,) = re.findall(r"\bjob (\d+)", done.stdout)
        assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED"
        assert jobs_end in "".join(file.read_text() for file in folder.rglob(f"*{job}_0.*"))


def test_every_line_of_the_guides_chapter_on_many_runs_works_and_its_preempted_sweep_ends_with_a_page(slurm, folder):
    """An array of 4: a prompt, two seeds, two objectives. Small runs, but long enough to be preempted."""
    settings = {"num_particles": 1, "num_updates": 16, "log_every": 1, "render_size": 16, "field.num_samples": 16}
    settings |= {"field.dense_grid.resolutions": "[8,16]"}
    (folder / "chapter").mkdir()
    show = Show(slurm, folder / "chapter", settings, ["a green duck"], RESTING)
    page = show.play(["Many runs"])
    runs = json.loads(show.run(["dist-vsd", "sweep", "status", "sweeps/prompts", "--json"], quietly=True))["runs"]
    assert [(run["state"], run["update"]) for run in runs] == [("done", 16)] * 4
    assert list((folder / "chapter/sweeps").rglob("requeues.json")), "no task was preempted"
    assert all(run["id"] in page.read_text() for run in runs)
