"""Every line in the heads of launch_configs/, run whole: the launcher's words and all the words of `train`.

What other machines have is replaced by REPLACED and FEWER_RANKS, and what takes long is made small by SMALL or SHORT, the lines for CPUs
by a random prior too, and nothing else. Each way of launching is `accelerate launch` itself: CPU ranks, DeepSpeed (whose ranks import it
anew), one process, two nodes. The other lines differ in what the launcher tells its ranks: accelerate parses their words and makes the
variables, as it does before it starts ranks; the ranks are forked (ranks.py).
"""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from tests.guide import lines_of_head
from tests.ranks import run_ranks
from tests.runs import HUB_PRIOR, ROOT, SMALL, TINY, checkpoint, environment, finish, free_port
from tests.warm_python import python

CONFIGS = {file.stem: file for file in sorted((ROOT / "launch_configs").glob("*.yaml"))}
FOR_CPUS = {name: line for name, file in CONFIGS.items() for line in lines_of_head(file) if line.variables}  # OMP_NUM_THREADS=1 ...
FOR_GPUS = {name: line for name, file in CONFIGS.items() for line in lines_of_head(file) if not line.variables}
FORKED = [name for name in FOR_GPUS if name not in ("single_gpu", "multi_node")]

REPLACED = {HUB_PRIOR: "the folder of a random prior of the same architecture", "node0": "127.0.0.1"}
FEWER_RANKS = ["--num_processes", "2"]  # of 8 and 16
SHORT = [*TINY, "--num-updates", "2", "--checkpoint-every", "2"]

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them as they stand")


def words_of(line, launch=(), prior=""):
    """Return a line's words for `accelerate launch`, with further ones, and those after `train`; what other machines have is replaced."""
    assert line.words[:2] == ["accelerate", "launch"]
    words = [{**REPLACED, HUB_PRIOR: prior}.get(word, word) for word in line.words[2:]]
    module, train = words.index("-m"), words.index("train")
    return [*words[:module], *launch, *words[module:train]], words[train + 1 :]


def start(line, flags, launch=(), prior="", cold=False):
    """Start a line by `accelerate launch`, with further flags of `train` and of the launcher; ``cold`` as in runs.py."""
    own, words = words_of(line, launch, prior)
    command = [sys.executable if cold else python(), "-m", "accelerate.commands.launch", *own, "train", *words, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment() | line.variables, cwd=ROOT, **pipes)


def fork(line, flags, launch=(), prior="", fault=()):
    """Run a line on two forked ranks, to which accelerate tells what it makes of its words; return as ``finish``."""
    own, words = words_of(line, launch, prior)
    return run_ranks([*words, *flags], 2, own, fault)


def saved(run_dir):
    return yaml.safe_load((run_dir / "config.yaml").read_text())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_has_keys_that_accelerate_knows_and_a_line_that_starts_it(name):
    config = load_config_from_file(str(CONFIGS[name]))  # refuses unknown keys
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(config.deepspeed_config) <= set(known)  # of these accelerate would ignore unknown ones
    lines = lines_of_head(CONFIGS[name])
    assert lines
    for line in lines:
        launcher = launch_command_parser().parse_args(line.words[2:])
        assert (launcher.config_file, launcher.module, launcher.training_script) == (f"launch_configs/{name}.yaml", True, "dist_vsd")


def test_no_line_of_a_head_is_left_out():
    heads = "\n".join(file.read_text().partition("\ncompute_environment")[0] for file in CONFIGS.values())
    assert heads.count("accelerate launch ") == len(FOR_CPUS) + len(FOR_GPUS)


@pytest.fixture(scope="module")
def phi_of_plain_ranks(tmp_path_factory, random_prior):
    """phi after two updates on two ranks without DeepSpeed."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    flags = [*SHORT, "--prior", random_prior, "--run-dir", str(run_dir)]
    code, output = finish(start(FOR_CPUS["cpu"], flags, ["--main_process_port", "0"]))
    assert code == 0, output
    return {n: t for n, t in checkpoint(run_dir, 2).items() if n.startswith("phi")}


@no_gpu
@pytest.mark.parametrize("name", FOR_CPUS)
def test_two_cpu_ranks_start_as_the_head_says_and_make_the_same_phi(name, tmp_path, phi_of_plain_ranks, random_prior):
    if name == "cpu":
        assert phi_of_plain_ranks  # its own run
        return
    pytest.importorskip("deepspeed")
    line, flags = FOR_CPUS[name], [*SHORT, "--prior", random_prior, "--run-dir", str(tmp_path / "run")]
    launched = name == "deepspeed_zero3"  # the others' files say nothing else to the launcher itself
    # Here ranks import DeepSpeed anew, and say what they say then.
    code, output = finish(start(line, flags, ["--main_process_port", "0"], cold=True)) if launched else fork(line, flags)
    assert code == 0, output
    assert "DeepSpeed" not in output, "its chatter is kept off the terminal"
    phi = checkpoint(tmp_path / "run", 2)
    for tensor_name, expected in phi_of_plain_ranks.items():
        # ZeRO 3 has a linear layer of its own: rounding, which two steps of Adam amplify where a gradient is nearly zero.
        torch.testing.assert_close(phi[tensor_name], expected, rtol=1e-3, atol=1e-4, msg=lambda m, n=tensor_name: f"{n}: {m}")


@no_gpu
@pytest.mark.parametrize("name", FORKED)
def test_a_line_for_gpus_runs_whole_on_two_cpu_ranks(name, random_prior, tmp_path):
    if "deepspeed" in name:
        pytest.importorskip("deepspeed")
    fault = ("fp16_passes_on_a_cpu", "all") if name == "fp16" else ()  # users are refused: see test_launch.py
    code, output = fork(FOR_GPUS[name], [*SMALL, "--run-dir", str(tmp_path / "run")], FEWER_RANKS, random_prior, fault)
    assert code == 0, output
    assert saved(tmp_path / "run")["precision"] == ("fp16" if name == "fp16" else "bf16")  # the launcher goes before the preset


@no_gpu
def test_the_line_for_one_gpu_runs_whole_on_a_cpu(random_prior, tmp_path):
    code, output = finish(start(FOR_GPUS["single_gpu"], [*SMALL, "--run-dir", str(tmp_path / "run")], prior=random_prior))
    assert code == 0, output
    assert saved(tmp_path / "run")["prior"] == random_prior


@no_gpu
def test_the_line_for_two_nodes_runs_whole_with_a_launcher_for_each(random_prior, tmp_path):
    flags, port = [*SMALL, "--run-dir", str(tmp_path / "run")], free_port()
    own = [[*FEWER_RANKS, "--main_process_port", port, "--machine_rank", node] for node in ("0", "1")]
    nodes = [start(FOR_GPUS["multi_node"], flags, launch, random_prior) for launch in own]
    ends = [finish(node, 600) for node in nodes]
    assert [code for code, _ in ends] == [0, 0], ends
    assert json.loads((tmp_path / "run/checkpoints/update_00000001/manifest.json").read_text())["world_size"] == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [name for name in FOR_GPUS if name != "multi_node"])
def test_gpus_start_as_the_head_says(name, random_prior, tmp_path):
    ranks = [] if name == "single_gpu" else ["--num_processes", str(torch.cuda.device_count())]
    flags = [*SMALL, "--run-dir", str(tmp_path / "run")]
    code, output = finish(start(FOR_GPUS[name], flags, [*ranks, "--main_process_port", "0"], random_prior))
    assert code == 0, output
