"""The command line: `dist-vsd train | render | view | export | sweep | prior | plan | bench | lab | info`.

Exit codes: 0 done; 1 failed; 2 bad input (one line says the rule, the value and what to change, and nothing was written);
75 stopped early with everything saved: start again with --resume to go on.
"""

from __future__ import annotations

import importlib
import os
import select
import sys
from typing import NoReturn

from dist_vsd.commands.arguments import nearest_command
from dist_vsd.errors import RunFailed, is_out_of_memory

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75

COMMANDS = {
    "train": "optimise particles for a prompt (also under `accelerate launch ... -m dist_vsd train`)",
    "render": "look at a run: turntables (GIF, MP4, PNG), grids, any cameras",
    "view": "look at a run in the browser, while it trains and after: turn particles, compare them",
    "export": "write particles as PLY or GLB: a mesh with colours, or points",
    "evaluate": "measure runs: CLIP score, R-precision, quality, variety, diversity, faces, overlap",
    "prior": "the embedded prior: `prior sample` draws from any prior, `prior train` makes it anew",
    "plan": "what a cluster would give: updates a second, communication, memory, node-hours",
    "bench": "measure scaling, or one update, on this machine",
    "sweep": "many runs from a file of prompts: plan, submit (Slurm or here), status, retry, cancel, collect",
    "lab": "denoising, SDS and VSD where the target is known exactly: figures and pictures of the particles",
    "requeue": "the last line of a Slurm script: back into the queue, if the run stopped early",
    "info": "versions, devices, presets, and which rank would own which particle",
}

HELP = """usage: dist-vsd COMMAND [OPTIONS]

Text to 3D by variational score distillation: n particles of one prompt, spread over ranks, with one shared eps_phi.

commands:
{commands}

start here:
  dist-vsd train "a green duck"                   two particles on this machine, some minutes on a CPU
  dist-vsd render runs/a-green-duck               their turntables
  dist-vsd COMMAND --help                         what it takes; --help-all has every flag, by topic

exit codes: 0 done, 1 failed, 2 bad input, 75 stopped early with everything saved (start again with --resume)
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; the process's own by default.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print(HELP.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())), end="")
        return DONE
    name = arguments[0]
    if name == "--version":
        from dist_vsd import __version__

        print(f"dist-vsd {__version__}")
        return DONE
    if name not in COMMANDS:
        return _refuse(f"command {name!r} does not exist{nearest_command(name, COMMANDS)}: use one of {', '.join(COMMANDS)}")
    _quiet_libraries()
    command = importlib.import_module(f"dist_vsd.commands.{name}")
    try:
        return command.run(arguments[1:])
    except Exception as error:
        if os.environ.get("DIST_VSD_TRACEBACK") and not isinstance(error, RunFailed):
            raise
        if is_out_of_memory(error):  # where nobody nearer to the work knew what would fit
            return _fail(f"out of memory ({' '.join(str(error).split())[:200]}): ask it for less at once, or give it more memory")
        if isinstance(error, RunFailed):
            return _fail(str(error))
        if isinstance(error, ValueError):
            return _refuse(str(error))
        raise  # anything else keeps its traceback, and Python's exit code 1
    except KeyboardInterrupt:
        print("dist-vsd: stopped at once; what was saved before is whole", file=sys.stderr)
        return STOPPED


def run_process() -> NoReturn:
    """Run one command as this process.

    One of several ranks ends without Python's teardown: threads of the libraries that want the interpreter then are unwound
    through C++ and abort the process, and the launcher would report a run that is done as failed.
    """
    try:
        try:
            code = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        code = FAILED
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _reader_is_gone() -> bool:
    """Say whether whoever read this process's output has had enough, as `head` has; nothing more is written then."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    is_gone = any(events & select.POLLERR for _, events in poll.poll(0))
    if is_gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it ends
    return is_gone


def _fail(message: str) -> int:
    """Print one line, on each rank that has a failure to tell."""
    print(f"dist-vsd: failed: {message}", file=sys.stderr)
    return FAILED


def _refuse(message: str) -> int:
    """Print one line on rank 0; every rank ends with the same exit code."""
    if os.environ.get("RANK", "0") == "0":
        print("dist-vsd: error: " + " ".join(message.split()), file=sys.stderr)
    return BAD_INPUT


def _quiet_libraries() -> None:
    """Keep the libraries' advice (a missing torchvision, progress bars of loading) off the terminal."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's advice on find_unused_parameters, which training/phi/trainers.py needs
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


if __name__ == "__main__":
    run_process()
