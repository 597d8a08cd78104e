"""The program that stands for Python in warm_python.py's environment: it has the work done by a process that has the libraries already.

It is started as `python -ISE warm_shim.py PYTHON WORDS...`, imports next to nothing, and is to its parent what Python would be: the same
output, exit code and death. Signals go on to the process that works; what it can't pass on, such as SIGKILL, ends that process too,
since it hangs on this one's connection. Whatever else Python is asked, and whenever that fails, the real Python takes its place.
"""

import _signal as signal
import _socket as socket
import marshal
import posix
import sys

HEAVY = (["tests.faults"], ["dist_vsd.scaling.pinned"])
LIGHT = ("sweep", "requeue")  # commands of dist_vsd that don't import torch, and whose place among processes matters
PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGABRT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGTERM)


def is_heavy(words):
    """Say whether these words after `python` import the libraries: a command of dist_vsd, a script of benchmarks/, a process of theirs."""
    words = [word for word in words if word not in ("-u", "-B")]
    if words[-1:] == ["--multiprocessing-fork"]:
        return True
    if words[:1] == ["-m"]:
        return words[1:2] in HEAVY or words[1:2] == ["dist_vsd"] and is_heavy_command(words[2:])
    script = words[0] if words else "-"
    if script.endswith("/dist-vsd"):
        return is_heavy_command(words[1:])
    return script.endswith(".py") and "benchmarks/" in script


def is_heavy_command(words):
    return bool(words) and not words[0].startswith("-") and words[0] not in LIGHT


def request(words):
    """Return what the other process must know, and the files that it takes over."""
    files = []
    for name in posix.listdir("/proc/self/fd"):
        try:
            posix.fstat(int(name))
        except OSError:  # of the listing itself
            continue
        files.append(int(name))
    ignored = [number for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
    return {"words": words, "cwd": posix.getcwd(), "environ": dict(posix.environ), "ignored": ignored, "files": files}


def ask(python, asked):
    """Ask for a process; return the connection, or None if there is none to be had."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(python.rpartition("/bin/")[0] + "/socket")
        text = marshal.dumps(asked)
        files = b"".join(number.to_bytes(4, sys.byteorder) for number in asked["files"])
        connection.sendmsg([len(text).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
        sent = 0
        while sent < len(text):
            sent += connection.send(text[sent:])
    except OSError:
        return None
    return connection


def read(connection, size):
    """Read so many bytes; fewer where the other side has gone."""
    text = b""
    while len(text) < size and (part := connection.recv(size - len(text))):
        text += part
    return text


def pass_on_signals(early):
    """Collect signals from now on; return a function that sends them, and all later ones, to a process."""
    target = []

    def caught(number, _frame):
        early.append(number)
        send()

    def send():
        while target and early:
            try:  # noqa: SIM105  (contextlib takes longer to import than all else)
                posix.kill(target[0], early.pop(0))
            except OSError:  # it has ended, and we are about to
                pass

    def begin(process):
        target.append(process)
        send()

    for number in PASSED_ON:
        signal.signal(number, caught)
    return begin


def end_as(status):
    """End as the other process has ended."""
    number = status & 0x7F
    if number:
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        posix.kill(posix.getpid(), number)
    posix._exit(status >> 8)


def be_served(connection, ignored):
    """Be the other process to our parent; return if it is none for us."""
    early = []
    begin = pass_on_signals(early)
    answer = read(connection, 5)
    if answer[:1] == b"w":
        begin(int.from_bytes(answer[1:], "big"))
        status = read(connection, 4)
        if len(status) < 4:
            posix.write(2, b"the warm python of the tests has gone\n")
        end_as(int.from_bytes(status, "big") if len(status) == 4 else signal.SIGKILL)
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    for number in early:
        posix.kill(posix.getpid(), number)


def main():
    python, words = sys.argv[1], sys.argv[2:]
    if is_heavy(words):
        asked = request(words)
        connection = ask(python, asked)
        if connection is not None:
            be_served(connection, asked["ignored"])
    posix.execv(posix.readlink(python.rpartition("/bin/")[0] + "/real_python"), [python, *words])


main()
