"""Every other Python from 3.10 to 3.14 that is installed here compiles all files, runs the command line up to where it needs torch, and
passes the class `quick` in an environment of its own, which `make test` makes (pythons.py).
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.pythons import MADE, OTHERS, environment_of, find, make_environment
from tests.runs import ROOT

INSTALLED = Path(pytest.__file__).parent.parent
# Of what is installed for this Python, what is written for all of them, and needed before torch is.
SHARED = (
    "tyro", "typeguard", "docstring_parser", "typing_extensions.py", "yaml", "rich", "markdown_it", "mdurl", "pygments", "safetensors",
)  # fmt: skip


@pytest.fixture(params=OTHERS)
def python(request):
    return find(request.param) or pytest.skip(f"no Python {request.param} here")


@pytest.fixture
def run(python, tmp_path):
    """Return a function that runs that Python on some words, without torch."""
    for name in SHARED:
        if (INSTALLED / name).exists():
            (tmp_path / name).symlink_to(INSTALLED / name)
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{tmp_path}", "PYTHONPYCACHEPREFIX": str(tmp_path / "compiled")}
    pipes = {"capture_output": True, "text": True, "env": variables, "cwd": tmp_path}
    return lambda *words: subprocess.run([python, *words], **pipes)


def test_another_python_compiles_every_file(run):
    done = run("-m", "compileall", "-q", *(str(ROOT / name) for name in ("dist_vsd", "tests", "benchmarks")))
    assert done.returncode == 0, done.stdout


def test_another_python_reads_the_command_line_and_refuses_in_one_line(run, tmp_path):
    helped = run("-m", "dist_vsd", "train", "--help")
    assert helped.returncode == 0, helped.stderr
    assert "--num-particles" in helped.stdout
    refused = run("-m", "dist_vsd", "train", "a green duck", "--num-updates", "0")
    assert (refused.returncode, refused.stderr) == (2, "dist-vsd: error: num_updates must be at least 1, got 0: raise --num-updates\n")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("version", OTHERS)
def test_the_quick_class_passes_on_another_python(version):
    folder = environment_of(version)
    if not (folder / MADE).exists():
        pytest.skip(f"no environment of Python {version} here: `make test` makes it, or says why not")
    ours = ("PYTEST_", "PYTHON", "VIRTUAL_ENV", "DIST_VSD_")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [folder / "bin" / "python", "-m", "pytest", "-m", "quick", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"\d+ passed", done.stdout)


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_a_python_that_can_have_no_environment_is_skipped_with_its_reason_in_one_line(tmp_path):
    python = tmp_path / "python3.99"
    python.write_text("#!/bin/sh\n[ \"$1\" = -c ] && exit\necho no venv here\necho 'Error: ensurepip is missing'\nexit 1\n")
    python.chmod(0o755)
    assert make_environment(str(python), "3.99") == "skipped: Error: ensurepip is missing"
    assert not environment_of("3.99").exists()
