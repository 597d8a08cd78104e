"""Every other Python from 3.10 to 3.14 that is installed here reads the code, and runs the command line up to where it needs torch.

Installing torch for each takes minutes: with DIST_VSD_EACH_PYTHON=1 that is done too, and the class `quick` runs there, by `make quick`.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT

INSTALLED = Path(pytest.__file__).parent.parent
OTHERS = [f"3.{minor}" for minor in range(10, 15) if minor != sys.version_info.minor]
# Of what is installed for this Python, what is written for all of them, and needed before torch is.
SHARED = (
    "tyro", "typeguard", "docstring_parser", "typing_extensions.py", "yaml", "rich", "markdown_it", "mdurl", "pygments", "safetensors",
)  # fmt: skip


def find(version):
    """Return an interpreter of a version, on the path or of pyenv, or an empty text."""
    kept = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python{version}"))
    for candidate in (*map(str, kept), shutil.which(f"python{version}")):
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:  # pyenv's own may be empty shims
            return candidate
    return ""


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


@pytest.mark.skipif("DIST_VSD_EACH_PYTHON" not in os.environ, reason="installs torch for each; DIST_VSD_EACH_PYTHON=1 asks for it")
def test_the_quick_class_passes_on_another_python(python):
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(["make", "quick", f"PYTHON={python}"], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"\d+ passed", done.stdout)
