"""Real ranks without their start-up: processes forked from one that has imported the libraries (warm_python.py), with the launcher's
variables.

Importing torch, diffusers and deepspeed takes a process seconds, and the tests start hundreds. What the launcher itself does is
shown by test_launch.py, test_distributed.py and test_rank_death.py, which start `accelerate launch` as users do.
"""

import faulthandler
import os
import pkgutil
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
from tests.warm_python import Process


def launch_words(config, num_ranks):
    """Return the words that start some ranks by a file of launch_configs/."""
    return ["--config_file", str(ROOT / "launch_configs" / f"{config}.yaml"), "--num_processes", str(num_ranks), "-m", "dist_vsd"]


def launcher_variables(words):
    """Return what `accelerate launch` tells its ranks of its words and their YAML, by accelerate's own parser and code."""
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    arguments.deepspeed_fields_from_accelerate_config = ",".join(load_config_from_file(arguments.config_file).deepspeed_config)
    before = dict(os.environ)
    try:
        variables = prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return {name: value for name, value in variables.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


class Ranks:
    """`dist-vsd train` on forked ranks, from the making of this object until ``finish``.

    Args:
        arguments: of `train`.
        num_ranks: one is a process without a launcher's variables.
        config: of launch_configs/, or the words of an `accelerate launch`.
        fault: a fault of tests/faults.py and the rank that it strikes.
        extension: "module:function" that every rank calls first, such as one that adds a row to a table.
        own: further arguments of a rank, by its number.

    Attributes:
        processes: of the ranks.
        store: the launcher's, served by this process; None for one rank.
    """

    def __init__(self, arguments, num_ranks=1, config="cpu", fault=(), extension="", own=None):
        shared, self.store = environment(), None
        if num_ranks > 1:
            # Served from here, as torchrun's agent does: a port looked up for rank 0 could be another's by the time it binds it.
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            words = launch_words(config, num_ranks) if isinstance(config, str) else config
            shared |= launcher_variables(words) | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
            shared |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / f"rank_{rank}" for rank in range(num_ranks)]
        self.processes = []
        for rank, file in enumerate(self._outputs):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {}
            words = ["train", *arguments, *(own or {}).get(rank, [])]
            self.processes.append(Process(rank_process, words, fault, extension, shared | variables, str(file)))

    def output(self, rank):
        """Return what a rank has printed so far."""
        return self._outputs[rank].read_text() if self._outputs[rank].exists() else ""

    def signal(self, rank, number):
        """Send a signal to a rank."""
        os.kill(self.processes[rank].pid, number)

    def finish(self, seconds=300, of=None):
        """Wait for ranks, all by default, for as long at most; kill those that are left. Return all exit codes, and all output."""
        for process in self.processes if of is None else [self.processes[rank] for rank in of]:
            process.join(seconds)
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGABRT)  # faulthandler prints where it waits
                process.join(10)
        for process in self.processes:
            process.kill()
            process.join()
        text = "".join(self.output(rank) for rank in range(len(self.processes)))
        self._folder.cleanup()
        return [process.exitcode for process in self.processes], text


def run_ranks(arguments, num_ranks=1, config="cpu", fault=(), extension="", seconds=300):
    """Run `dist-vsd train` on forked ranks to its end; see ``Ranks``.

    Args:
        arguments, num_ranks, config, fault, extension: as there.
        seconds: after which the ranks are killed.

    Returns:
        The greatest exit code, and what all ranks printed.
    """
    codes, text = Ranks(arguments, num_ranks, config, fault, extension).finish(seconds)
    return max(map(abs, codes)), text


def rank_process(arguments, fault, extension, variables, output):
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
        if extension:
            pkgutil.resolve_name(extension)()
        if fault:
            FAULTS[fault[0]](os.environ.get("RANK", "0") == fault[1])
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
