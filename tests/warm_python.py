"""A Python that has imported the libraries already, for processes that tests start as users do: its child does what it is asked.

Importing torch, diffusers and peft takes a process five seconds of a core, and the tests start hundreds. Here one process imports them
once for all workers of pytest and forks a child for each request. `python()` is a program that is started like any Python, whose place
in a tree of processes, output, exit code and signals are real (warm_shim.py); the child takes over its files, environment, working
folder, limits and namespaces, and dies with it. What it is not: the start of a process, its imports, its teardown, its /proc entry and
its own SIGSTOP. Tests whose claim is one of these start the real Python: `sys.executable`.

`Process` is a forked child without a program in between, for ranks (ranks.py).
"""

import fcntl
import marshal
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from tests.runs import ROOT, environment

FOLDER = "DIST_VSD_TESTS_WARM_PYTHON"  # the variable that tells workers of pytest where it is
ENVIRONMENT = environment()  # before a test changes it


def make_folder():
    """Make the environment whose Python is warm, for this process and those that it starts; nothing is imported yet."""
    folder = Path(tempfile.mkdtemp(prefix="vsd_warm_"))
    (folder / "bin").mkdir()
    (folder / "real_python").symlink_to(sys.executable)
    (folder / "owner").write_text(str(os.getpid()))
    # An environment beside the real one, with its packages: what falls through to the real Python takes itself for this one.
    own = Path(sys.prefix) / "pyvenv.cfg"
    text = own.read_text() if own.exists() else f"home = {Path(sys.executable).parent}\ninclude-system-site-packages = true\n"
    (folder / "pyvenv.cfg").write_text(text)
    for name in ("lib", "lib64"):
        if own.exists() and (Path(sys.prefix) / name).exists():
            (folder / name).symlink_to(Path(sys.prefix) / name)
    python, base = folder / "bin" / "python", Path(sys._base_executable).resolve()
    write_program(python, f"exec '{base}' -ISE '{ROOT}/tests/warm_shim.py' \"$0\" \"$@\"")
    for name in ("accelerate", "dist-vsd"):
        write_program(folder / "bin" / name, f"exec '{python}' '{sysconfig.get_path('scripts')}/{name}' \"$@\"")
    os.environ[FOLDER] = str(folder)


def write_program(file, line):
    file.write_text(f"#!/bin/sh\n{line}\n")
    file.chmod(0o755)


def remove_folder():
    """End the process that forks, and all its children."""
    folder = Path(os.environ.pop(FOLDER))
    shutil.rmtree(folder, ignore_errors=True)  # which it notices


def folder():
    """Return the folder of the warm Python; the first call of all workers starts it."""
    folder = Path(os.environ[FOLDER])
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "socket").exists():
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(folder / "socket"))
            listener.listen(256)  # who connects waits until the libraries are there
            with open(folder / "log", "w") as log:
                # The real Python, which takes itself for the warm one: what its children start by sys.executable is warm as well.
                command = [str(folder / "bin" / "python"), "-u", "-m", "tests.warm_server", str(listener.fileno()), str(folder)]
                pipes = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
                options = {"executable": sys.executable, "env": ENVIRONMENT, "cwd": ROOT, "pass_fds": [listener.fileno()]}
                subprocess.Popen(command, **options, **pipes)
            listener.close()
    return folder


def python():
    """Return the path of the warm Python; outside pytest, of Python."""
    return str(folder() / "bin" / "python") if FOLDER in os.environ else sys.executable


def on_path():
    """Return an environment whose PATH begins with the warm python, accelerate and dist-vsd."""
    return environment() | {"PATH": f"{Path(python()).parent}:{os.environ['PATH']}"}


class Process:
    """A forked child that calls a function of a module, until it ends or this process does.

    Args:
        function: of a module that the child can import.
        arguments: its positional ones: text, numbers, lists, dictionaries.

    Attributes:
        pid: of the child.
        exitcode: None while it lives, and minus a signal that killed it.
    """

    def __init__(self, function, *arguments):
        self._status = b""
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(folder() / "socket"))
        send_request(self._connection, {"call": (function.__module__, function.__qualname__, arguments), "files": []})
        answer = self._connection.recv(5, socket.MSG_WAITALL)
        assert answer[:1] == b"w", (folder() / "log").read_text()
        self.pid = int.from_bytes(answer[1:], "big")

    @property
    def exitcode(self):
        self.join(0)
        return os.waitstatus_to_exitcode(int.from_bytes(self._status, "big")) if self._status else None

    def join(self, seconds=None):
        """Wait for its end, for as long at most."""
        if not self._status and select.select([self._connection], [], [], seconds)[0]:
            self._status = self._connection.recv(4, socket.MSG_WAITALL) or signal.SIGKILL.to_bytes(4, "big")

    def is_alive(self):
        return self.exitcode is None

    def kill(self):
        if self.exitcode is None:
            os.kill(self.pid, signal.SIGKILL)


def send_request(connection, request):
    text = marshal.dumps(request)
    connection.sendall(len(text).to_bytes(8, "big") + text)
