"""The process behind warm_python.py: it imports the libraries once, and forks a child for each request."""

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import marshal
import os
import random
import resource
import runpy
import select
import shutil
import signal
import socket
import struct
import sys
import threading
import traceback
from pathlib import Path

# Variables that libraries read when they are imported; who wants others than the tests' own gets the real Python.
READ_AT_IMPORT = (
    "PYTHON", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DIFFUSERS_", "TORCH_LOGS", "TORCH_CPP", "PYTORCH_", "DS_", "LD_", "MKL_", "KMP_",
    "LC_", "LANG", "TZ", "HOME", "XDG_", "MALLOC_", "NUMEXPR_", "OPENBLAS_",
)  # fmt: skip
FREE = ("PYTHONUNBUFFERED", "PYTHON_EXEC", "TORCH_CPP_LOG_LEVEL", "DS_ACCELERATOR")  # set by dist_vsd itself, or of no effect
PR_SET_PDEATHSIG = 1
FAULT = "DIST_VSD_TESTS_FAULT"  # of faults.py, for every `dist_vsd train` that is told of it, such as those of a Slurm job
LOOK_SECONDS = 1.0


def serve(descriptor, folder):
    """Import the libraries, and fork a child for each connection, until the owner of the folder or the folder is gone."""
    before = dict(os.environ)
    from tests import preloaded

    preloaded.warm_up()
    added = {name: value for name, value in os.environ.items() if name not in before}  # dist_vsd does so at its start
    gc.collect()
    gc.freeze()  # what is shared with children isn't written to by their collections
    assert len(os.listdir("/proc/self/task")) == 1, "threads don't survive a fork"
    listener = socket.socket(fileno=descriptor)
    owner, children, poll = int((folder / "owner").read_text()), Children(), select.poll()
    children.poll = poll
    poll.register(listener, select.POLLIN)
    while (folder / "owner").exists() and Path(f"/proc/{owner}").exists():
        for descriptor, _ in poll.poll(LOOK_SECONDS * 1000):
            if descriptor != listener.fileno():
                children.look(descriptor)
                continue
            connection, _ = listener.accept()
            pid = os.fork()
            if pid == 0:
                children.close()
                listener.close()
                be_child(connection, before, added)
            children.add(pid, connection)
    children.kill()
    shutil.rmtree(folder, ignore_errors=True)  # of an owner that was killed


class Children:
    """The children that live, each with the connection to whom it serves."""

    def __init__(self):
        self._by_descriptor = {}

    def add(self, pid, connection):
        child = (pid, os.pidfd_open(pid), connection)
        self._by_descriptor[child[1]] = self._by_descriptor[connection.fileno()] = child
        self.poll.register(child[1], select.POLLIN)
        self.poll.register(connection, 0)  # tells when the other side has gone

    def look(self, descriptor):
        """Pass on the end of a child; end a child whose other side has gone."""
        if descriptor not in self._by_descriptor:
            return
        pid, pidfd, connection = self._by_descriptor[descriptor]
        if descriptor == pidfd:
            _, status = os.waitpid(pid, 0)
            with connection:
                del self._by_descriptor[pidfd], self._by_descriptor[connection.fileno()]
                self.poll.unregister(pidfd)
                self.poll.unregister(connection)
                os.close(pidfd)
                with contextlib.suppress(OSError):  # nobody waits for it
                    connection.sendall(status.to_bytes(4, "big"))
        else:
            os.kill(pid, signal.SIGKILL)
            self.poll.modify(connection, 0)

    def kill(self):
        for pid, *_ in self._by_descriptor.values():
            os.kill(pid, signal.SIGKILL)

    def close(self):
        """Close in a child what is its elders'."""
        for _, pidfd, connection in set(self._by_descriptor.values()):
            os.close(pidfd)
            connection.close()


def variables_of_import(environ):
    """Return what the libraries read when they are imported, and where the package is found first."""
    found = {n: v for n, v in environ.items() if n.startswith(READ_AT_IMPORT) and n not in FREE}
    return found | {"PYTHONPATH": environ.get("PYTHONPATH", "").split(os.pathsep)[0]}


def be_child(connection, before, added):
    """Read the request, become what it asks for, do it, and end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    try:
        request, files = receive(connection)
        if "call" not in request:
            become(request, files, connection, before, added)
    except BaseException:
        traceback.print_exc()  # into the log
        connection.sendall(b"r0000")  # the real one shall do it
        os._exit(1)
    connection.sendall(b"w" + os.getpid().to_bytes(4, "big"))
    code = ended(lambda: call(request["call"]) if "call" in request else run(request["words"]))
    os._exit(code)


def receive(connection):
    """Return a request and its files."""
    head, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(4 * 200))
    files = [number for _, _, text in ancillary for number in struct.unpack(f"{len(text) // 4}i", text)]
    text = connection.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
    return marshal.loads(text), files


def become(request, files, connection, before, added):
    """Take over files, environment, folder, limits, signals and namespaces of the program that asks."""
    environ = {os.fsdecode(name): os.fsdecode(value) for name, value in request["environ"].items()}
    if variables_of_import(added | environ) != variables_of_import(added | before):
        raise ValueError("it would have imported the libraries otherwise")
    if os.path.exists("/dev/nvidiactl"):
        raise ValueError("a GPU's driver does not survive a fork")
    asking, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    enter_namespaces(asking)
    os.chdir(request["cwd"])
    take_limits(asking)
    os.environ.clear()
    os.environ.update(environ)
    take_files(files, request["files"], connection)
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:  # every Python ignores these two
        if signal.getsignal(number) == signal.SIG_IGN:  # this one does, by nohup perhaps, and who asks may not
            signal.signal(number, signal.SIG_DFL)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    if signal.SIGINT not in request["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.getppid = lambda: parent_of(asking)
    be_of_its_own(environ)


def enter_namespaces(process):
    """Enter another process's host name, files and network, where they are not ours."""
    ours, theirs = Path("/proc/self/ns"), Path(f"/proc/{process}/ns")
    others = [name for name in ("net", "uts", "mnt") if os.readlink(ours / name) != os.readlink(theirs / name)]
    opened = [os.open(theirs / name, os.O_RDONLY | os.O_CLOEXEC) for name in others]
    for descriptor in opened:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(descriptor)


def take_limits(process):
    """Take another process's limits, cores, priority and umask."""
    for name in (name for name in dir(resource) if name.startswith("RLIMIT_")):
        limit = resource.prlimit(process, getattr(resource, name))
        if resource.getrlimit(getattr(resource, name)) != limit:
            resource.setrlimit(getattr(resource, name), limit)
    os.sched_setaffinity(0, os.sched_getaffinity(process))
    os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, process))
    status = Path(f"/proc/{process}/status").read_text()
    os.umask(int(status.partition("Umask:")[2].split()[0], 8))


def take_files(files, numbers, connection):
    """Give received files the numbers that they have in the program that asks."""
    above = max([*files, *numbers, connection.fileno()]) + 1
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, above) for file in files]
    if connection.fileno() in numbers:
        kept = fcntl.fcntl(connection.fileno(), fcntl.F_DUPFD_CLOEXEC, above)
        connection.detach()
        connection.__init__(fileno=kept)
    for file in files:
        os.close(file)
    for file, number in zip(moved, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)


def be_of_its_own(environ):
    """Set what Python and the libraries have at their start from the environment and from chance."""
    import numpy
    import torch

    is_unbuffered = bool(environ.get("PYTHONUNBUFFERED"))
    sys.stdout.reconfigure(line_buffering=os.isatty(1), write_through=is_unbuffered)
    sys.stderr.reconfigure(line_buffering=True, write_through=is_unbuffered)
    threads = environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(int(threads) if threads else len(os.sched_getaffinity(0)))
    sys.path[1:1] = [path for path in environ["PYTHONPATH"].split(os.pathsep) if path not in sys.path]
    random.seed()
    numpy.random.seed()  # noqa: NPY002  (what libraries draw from)


def parent_of(process):
    """Return the parent of the program that this process works for: what it takes for its own."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has gone, and this process will in a moment
        return 1


def run(words):
    """Do what `python WORDS` does."""
    while words[0] in ("-u", "-B"):
        if words[0] == "-u":
            sys.stdout.reconfigure(write_through=True)
        words = words[1:]
    if words[0] == "-c":  # of multiprocessing
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        exec(words[1], {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        if FAULT in os.environ and words[1:3] == ["dist_vsd", "train"]:
            importlib.import_module("tests.faults").FAULTS[os.environ[FAULT]](True)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def call(asked):
    """Do what ``Process`` asks for."""
    module, name, arguments = asked
    getattr(importlib.import_module(module), name)(*arguments)


def ended(action):
    """Act; return the exit code, as Python does as it ends."""
    code = 0
    try:
        action()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        traceback.print_exc()
        code = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = 120
    return code & 0xFF


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]))
