"""tests/warm_python.py: to who starts it, its process is what Python's would be."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import warm_python
from tests.runs import ROOT, environment

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
SLEEPER = """import json, os, signal, sys, time
sys.path[:0] = [ROOT]
if "ignore" in sys.argv: signal.signal(signal.SIGUSR1, lambda *_: print("caught", flush=True))
print(os.getpid(), flush=True)
time.sleep(600)
""".replace("ROOT", repr(str(ROOT)))
TELLER = """import json, os, resource, signal, sys, torch
print(json.dumps({
    "cwd": os.getcwd(), "argv": sys.argv, "path": sys.path[0], "name": __name__, "executable": sys.executable, "stdin": sys.stdin.read(),
    "own": os.environ.get("OWN"), "home": "HOME" in os.environ, "threads": torch.get_num_threads(), "parent": os.getppid(),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "cores": len(os.sched_getaffinity(0)), "umask": os.umask(0),
    "usr1": signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN, "packages": "diffusers" in sys.modules,
    "net": os.readlink("/proc/self/ns/net"),
}))
"""


@pytest.fixture
def program(tmp_path):
    """Return a function that writes a script which the warm Python takes for one of benchmarks/."""

    def write(text):
        file = tmp_path / "benchmarks" / "script.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return [warm_python.python(), str(file)]

    return write


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_has_the_libraries_and_is_told_all_that_a_process_is(program, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (123, 200))
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        os.umask(0o027)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    command = [*program(TELLER), "one", "two words"]
    variables = environment() | {"OWN": "mine", "OMP_NUM_THREADS": "3"}
    done = subprocess.run(command, env=variables, cwd=tmp_path, input="hello", preexec_fn=limit, **PIPES)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        "cwd": str(tmp_path), "argv": command[1:], "path": str(tmp_path / "benchmarks"), "name": "__main__", "executable": command[0],
        "stdin": "hello", "own": "mine", "home": True, "threads": 3, "parent": os.getpid(), "files": 123, "cores": 1, "umask": 0o027,
        "usr1": True, "packages": True, "net": os.readlink("/proc/self/ns/net"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        ("import sys; sys.exit(75)", 75, ""),
        ("import sys; sys.exit('no')", 1, "no\n"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong\n"),
        ("print(end='')", 0, ""),
        ("import os; os._exit(3)", 3, ""),
        ("import os; os.abort()", -signal.SIGABRT, ""),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import atexit, sys; atexit.register(print, 'late', file=sys.stderr)", 0, "late\n"),
        ("import threading, sys; threading.Timer(0.1, print, ['late'], {'file': sys.stderr}).start()", 0, "late\n"),
    ],
)
def test_it_ends_as_python_does(program, text, code, told):
    warm = subprocess.run(program(text), env=environment(), **PIPES)
    assert warm.returncode == code
    assert warm.stderr.endswith(told)
    assert warm.returncode == subprocess.run([sys.executable, "-c", text], **PIPES).returncode


def test_a_command_that_is_refused_says_so_and_ends_with_2():
    done = subprocess.run([warm_python.python(), "-m", "dist_vsd", "info", "--no-such-flag"], env=environment(), **PIPES)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("dist-vsd: error: ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2])
def test_a_signal_that_would_end_it_does_and_is_the_end_of_who_was_started(program, number):
    as_by_default = {"preexec_fn": lambda: signal.signal(number, signal.SIG_DFL)}  # nohup ignores one
    process = subprocess.Popen(program(SLEEPER), env=environment(), **as_by_default, **PIPES)
    pid = int(process.stdout.readline())
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number
    assert not lives(pid)


def test_a_signal_that_it_catches_reaches_it_also_where_it_was_ignored_at_first(program):
    ignores = {"preexec_fn": lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN)}
    process = subprocess.Popen([*program(SLEEPER), "ignore"], env=environment(), **ignores, **PIPES)
    process.stdout.readline()
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "caught\n"
    process.kill()
    process.communicate()


def test_a_kill_of_who_was_started_kills_it(program):
    process = subprocess.Popen(program(SLEEPER), env=environment(), **PIPES)
    pid = int(process.stdout.readline())
    assert lives(pid)
    process.kill()
    process.communicate()
    wait_until(lambda: not lives(pid))


def test_who_outlives_its_parent_learns_of_it(program):
    """As after a launcher's death."""
    look = "import os, time; before = os.getppid(); print(before, flush=True)"
    command = program(f"{look}\nwhile os.getppid() == before: time.sleep(0.05)\nprint('gone')")
    parent = subprocess.Popen([sys.executable, "-c", f"import subprocess; subprocess.run({command!r})"], env=environment(), **PIPES)
    assert int(parent.stdout.readline()) == parent.pid
    parent.kill()
    assert parent.stdout.readline() == "gone\n"
    parent.communicate()


def test_processes_that_it_starts_by_its_own_name_are_warm_and_all_else_is_python_itself(program):
    inner = "import sys; print(sys.executable, len(sys.modules))"
    script = program(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])")
    done = subprocess.run(script, env=environment(), **PIPES)
    executable, count = done.stdout.split()
    assert executable == warm_python.python()
    assert int(count) < 500
    where = "import torch, dist_vsd; print(dist_vsd.__file__, torch.__version__)"
    one, other = (subprocess.run([python, "-c", where], env=environment(), **PIPES) for python in (warm_python.python(), sys.executable))
    assert (one.returncode, one.stdout) == (other.returncode, other.stdout)


def test_who_wants_libraries_imported_otherwise_gets_python_itself(program):
    done = subprocess.run([*program(TELLER)], env=environment() | {"HF_HUB_OFFLINE": "0"}, stdin=subprocess.DEVNULL, **PIPES)
    told = json.loads(done.stdout)
    assert (told["packages"], told["executable"]) == (False, warm_python.python())


def test_files_that_are_passed_keep_their_numbers(program, tmp_path):
    with open(tmp_path / "file", "w") as file:
        text = f"import os; os.write({file.fileno()}, b'written')"
        subprocess.run(program(text), env=environment(), pass_fds=[file.fileno()], check=True)
    assert (tmp_path / "file").read_text() == "written"


def test_a_reader_that_has_had_enough_ends_it_as_it_ends_python(program):
    text = "for _ in range(100000): print('word')"
    codes = []
    for command in (program(text), [sys.executable, "-c", text]):
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.stdout.readline()
        process.stdout.close()
        codes.append(process.wait(60))
    assert codes[0] == codes[1] != 0


def exits_with(code):
    os._exit(code)


def sleeps():
    time.sleep(600)


def test_a_process_of_a_function_ends_as_the_function_does():
    process = warm_python.Process(exits_with, 7)
    process.join()
    assert process.exitcode == 7
    process = warm_python.Process(sleeps)
    process.join(0.1)
    assert process.exitcode is None
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes namespaces")
def test_it_is_where_who_asks_is_as_a_job_is_on_its_node(program):
    """In the network, with the host name and the files of a node of slurm_cluster.py."""
    command = ["unshare", "--net", "--uts", "--mount", *program(TELLER)]
    done = subprocess.run(command, env=environment(), stdin=subprocess.DEVNULL, **PIPES)
    if "Operation not permitted" in done.stderr:
        pytest.skip("not in this container")
    told = json.loads(done.stdout)
    assert told["packages"]
    assert told["net"] != os.readlink("/proc/self/ns/net")
