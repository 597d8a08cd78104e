"""kernels/choice.py: one place decides which implementation serves, and says so."""

import ast
from pathlib import Path

import pytest
import torch

from dist_vsd.kernels import choice
from dist_vsd.kernels.choice import implementation, kernels_in_words, serving

CPU, CUDA, META, OTHER = (torch.device(name) for name in ("cpu", "cuda", "meta", "xpu"))
KERNELS = Path(__file__).parent.parent / "dist_vsd"


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch):
    monkeypatch.delenv("DIST_VSD_KERNELS", raising=False)


@pytest.fixture
def triton(monkeypatch):
    """Says whether triton is installed and finds a compiler, whether it does or not."""

    def let(there, compiler=True):
        monkeypatch.setattr(choice, "has_triton", lambda: there)
        monkeypatch.setattr(choice, "_lacking_to_compile", lambda: "" if compiler else "triton finds no C compiler: install gcc")

    return let


@pytest.fixture
def in_c(monkeypatch):
    """Says whether kernels in C can be compiled, whether they can or not."""
    return lambda there: monkeypatch.setattr(choice.c_kernels, "lacking", lambda: "" if there else "no C compiler is found: install gcc")


def test_triton_serves_cuda_and_c_cpus_where_they_lack_nothing_and_plain_torch_all_else(triton, in_c):
    triton(True)
    in_c(True)
    assert [implementation(device) for device in (CUDA, META, CPU, OTHER)] == ["triton", "triton", "c", "torch"]
    triton(False)
    in_c(False)
    assert implementation(CUDA) == implementation(CPU) == "torch"
    triton(True, compiler=False)
    assert implementation(CUDA) == "torch"


@pytest.mark.parametrize("asked", ["torch", "triton"])
def test_the_environment_has_the_last_word(asked, triton, monkeypatch):
    triton(True)
    monkeypatch.setenv("DIST_VSD_KERNELS", asked)
    assert implementation(CUDA) == implementation(CPU) == asked


@pytest.mark.parametrize(
    ("asked", "there", "device", "rule"),
    [
        ("cuda", (True, True), CPU, "DIST_VSD_KERNELS must be one of triton, c, torch, got 'cuda': change it, or unset it"),
        ("triton", (False, True), CUDA, "=triton can not be had: triton is not installed: pip install triton; or unset"),
        ("triton", (True, False), CUDA, "=triton can not be had: triton finds no C compiler: install gcc; or unset"),
        ("c", (True, True), CPU, "=c can not be had: no C compiler is found: install gcc; or unset"),
        ("c", (True, True), CUDA, "=c can not be had: kernels in C serve CPUs, not cuda; or unset"),
        ("triton", (True, True), OTHER, "=triton can not be had: triton serves CUDA, and CPUs in its interpreter, not xpu; or unset"),
    ],
)
def test_what_there_is_not_is_refused_with_a_remedy(asked, there, device, rule, triton, in_c, monkeypatch):
    triton(*there)
    in_c(False)
    monkeypatch.setenv("DIST_VSD_KERNELS", asked)
    with pytest.raises(ValueError, match=rule):
        implementation(device)


def test_in_the_interpreter_no_compiler_is_needed(triton, monkeypatch):
    triton(True, compiler=False)
    monkeypatch.setenv("DIST_VSD_KERNELS", "triton")
    assert implementation(CPU) == "triton"


def test_a_compiler_and_pythons_headers_are_looked_for_where_triton_does(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(choice.shutil, "which", {"clang": "/usr/bin/clang"}.get)
    monkeypatch.setattr(choice.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    choice._lacking_to_compile.cache_clear()
    assert choice._lacking_to_compile() == f"there is no Python.h in {tmp_path}: install python3-dev"
    (tmp_path / "Python.h").touch()
    choice._lacking_to_compile.cache_clear()
    assert choice._lacking_to_compile() == ""
    monkeypatch.setattr(choice.shutil, "which", lambda name: None)
    choice._lacking_to_compile.cache_clear()
    assert choice._lacking_to_compile() == "triton finds no C compiler: install gcc"
    choice._lacking_to_compile.cache_clear()


def test_kernels_serve_single_precision_alone(triton, monkeypatch):
    triton(True)
    monkeypatch.setenv("DIST_VSD_KERNELS", "triton")
    assert serving(torch.ones(1), torch.ones(2)) == "triton"
    assert serving(torch.ones(1), torch.ones(2).double()) == "torch"


def test_the_choice_is_said_in_a_line_with_its_reason(triton, in_c, monkeypatch):
    triton(False)
    in_c(True)
    assert kernels_in_words(CPU) == "kernels in C"
    in_c(False)
    assert [kernels_in_words(device) for device in (CPU, CUDA)] == [
        "plain torch, as no C compiler is found: install gcc",
        "plain torch, as triton is not installed: pip install triton",
    ]
    triton(True)
    monkeypatch.setattr(choice.importlib.metadata, "version", lambda name: "3.9.0")
    assert kernels_in_words(CUDA) == "Triton 3.9.0"
    monkeypatch.setenv("DIST_VSD_KERNELS", "triton")
    assert kernels_in_words(CPU) == "Triton 3.9.0, in its interpreter (DIST_VSD_KERNELS=triton)"
    monkeypatch.setenv("DIST_VSD_KERNELS", "torch")
    assert kernels_in_words(CUDA) == "plain torch (DIST_VSD_KERNELS=torch)"


def test_only_files_of_kernels_import_triton_and_none_of_them_is_imported_at_import_time():
    """So that the package imports where triton is missing, and where it is not no sooner than it serves."""
    apart = {"launch", *(file.stem for file in KERNELS.rglob("*_triton.py"))}
    assert len(apart) == 6
    for file in KERNELS.rglob("*.py"):
        imports = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {name for node in imports for name in (getattr(node, "module", None) or "", *(alias.name for alias in node.names))}
        parts = {part for name in names for part in name.split(".")}
        assert file.stem in apart or not parts & ({"triton"} | (apart - {"launch"})), file
        assert file.stem in apart or "dist_vsd.kernels.launch" not in names, file
