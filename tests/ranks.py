"""Real ranks without their start-up: processes forked from one that has imported the libraries, with the launcher's variables.

Importing torch, diffusers and deepspeed takes a process seconds, and the tests start hundreds. What the launcher itself does is
shown by test_launch.py, test_distributed.py and test_rank_death.py, which start `accelerate launch` as users do.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed import TCPStore

from tests.runs import ROOT, environment

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.preloaded"])


def launcher_variables(config, num_ranks):
    """Return what `accelerate launch --config_file` tells its ranks of its YAML, by accelerate's own words."""
    words = ["--config_file", str(ROOT / "launch_configs" / f"{config}.yaml"), "--num_processes", str(num_ranks), "-m", "dist_vsd"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    arguments.deepspeed_fields_from_accelerate_config = ",".join(load_config_from_file(arguments.config_file).deepspeed_config)
    before = dict(os.environ)
    try:
        variables = prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return {name: value for name, value in variables.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def run_ranks(arguments, num_ranks=1, config="cpu", fault=(), seconds=300):
    """Run `dist-vsd train` on forked ranks to its end.

    Args:
        arguments: of `train`.
        num_ranks: one is a process without a launcher's variables.
        config: of launch_configs/.
        fault: a fault of tests/faults.py and the rank that it strikes.
        seconds: after which the ranks are killed.

    Returns:
        The greatest exit code, and what all ranks printed.
    """
    shared = environment()
    if num_ranks > 1:
        # The store is served from here, as torchrun's agent does: a port looked up for rank 0 could be another's by the time it binds it.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared |= launcher_variables(config, num_ranks) | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        shared |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {} for rank in range(num_ranks)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"rank_{rank}" for rank in range(num_ranks)]
        words = [(["train", *arguments], fault, shared | variables, str(file)) for variables, file in zip(own, outputs, strict=True)]
        ranks = [SERVER.Process(target=_rank, args=arguments_of_rank) for arguments_of_rank in words]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(seconds)
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGABRT)  # faulthandler prints where it waits
                process.join()
        text = "".join(output.read_text() for output in outputs)
    return max(abs(process.exitcode) for process in ranks), text


def _rank(arguments, fault, variables, output):
    """Be a rank: its variables, its output, its exit code."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(variables)
    faulthandler.enable()
    from dist_vsd.cli import main
    from tests.faults import FAULTS

    try:
        if fault:
            FAULTS[fault[0]](os.environ.get("RANK", "0") == fault[1])
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
