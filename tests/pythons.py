"""The other Pythons from 3.10 to 3.14 that are installed here, and an environment for each: `make test` runs the class `quick` on them.

    python -m tests.pythons 2.13.0      makes those that are missing, with that torch; what can't be made is named with its reason
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
OTHERS = [f"3.{minor}" for minor in range(10, 15) if minor != sys.version_info.minor]
MADE = ".installed_for_quick"
GIB_NEEDED = 12  # torch comes with 5 GiB of CUDA's libraries where no build for CPUs is found, and pip keeps what it has loaded
ALL = "DIST_VSD_ALL_PYTHONS"  # set: environments are made even so


def find(version):
    """Return an interpreter of a version, of pyenv or on the path, or an empty text."""
    kept = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python{version}"))
    for candidate in (*map(str, kept), shutil.which(f"python{version}")):
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:  # pyenv's own may be empty shims
            return candidate
    return ""


def environment_of(version):
    """Return the folder of a version's environment, as the Makefile names it."""
    return ROOT / f".venv-python{version}"


def brings_cuda(python, torch):
    """Say whether pip would install CUDA's libraries with a version of torch, by asking it; little is downloaded for that."""
    words = ["-m", "pip", "install", "--dry-run", "--quiet", "--disable-pip-version-check", "--ignore-installed", "--report", "-"]
    done = subprocess.run([python, *words, f"torch=={torch}"], capture_output=True, text=True)
    if done.returncode:
        return False  # it will say why when it is to be installed
    return any(one["metadata"]["name"].startswith("nvidia-") for one in json.loads(done.stdout)["install"])


def make_environment(python, version, torch=""):
    """Make the environment of an interpreter by the Makefile's own rule; return what is to be said of it."""
    folder, begin = environment_of(version), time.monotonic()
    free = shutil.disk_usage(ROOT).free / 2**30
    if not folder.exists() and free < GIB_NEEDED:
        return f"skipped: its environment may take {GIB_NEEDED} GiB of disk, {free:.0f} GiB are free"
    if not folder.exists() and torch and not os.environ.get(ALL) and brings_cuda(python, torch):
        return f"skipped: torch {torch} brings 5 GiB of CUDA's libraries there; {ALL}=1 or `make quick PYTHON={python}` makes it even so"
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of a `make` that this is part of
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": variables, "cwd": ROOT}
    done = subprocess.run(["make", "--silent", f"PYTHON={python}", f"{folder.name}/{MADE}"], **pipes)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip() and not line.startswith("make")]
        return f"skipped: {next((line for line in lines if 'error' in line.lower()), lines[0] if lines else 'make failed')}"
    seconds = time.monotonic() - begin
    return f"{folder.name} is there" + (f", made in {seconds:.0f} s" if seconds > 1 else "")


def main():
    """Make all that are missing; print a line for each Python that is installed."""
    for version in OTHERS:
        if python := find(version):
            print(f"Python {version}: {make_environment(python, version, *sys.argv[1:])}", flush=True)


if __name__ == "__main__":
    main()
