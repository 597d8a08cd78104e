"""The package's floors (DESIGN.md): a file imports from its own floor or lower ones, and nothing goes in circles."""

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dist_vsd"
FLOORS = {
    "__init__": 0, "diffusion": 0, "cameras": 0, "normal_maps": 0, "view_words": 0, "distributed": 0, "image_files": 0, "serialization": 0,
    "writable": 0, "errors": 0, "device": 0, "cache_folder": 0, "optimizer": 0, "stopwatch": 0, "kernels": 0, "rasterization": 0,
    "particles": 1, "priors": 1, "score": 1,
    "objectives": 2, "config": 2, "config_files": 2,
    "training": 3, "runs": 3,
    "reporting": 4, "evaluation": 4, "export": 4, "viewing": 4,
    "sweep": 5, "scaling": 5, "lab": 5,
    "commands": 6,
    "cli": 7,
    "__main__": 8,
}  # fmt: skip


def module_name(file):
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(source, module):
    """Return the modules of this package that a source imports, wherever in it: in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]
        else:
            continue
        found |= {name if name != "dist_vsd" else "dist_vsd.__init__" for name in names if name.split(".")[0] == "dist_vsd"}
    return found - {module}


IMPORTS = {module: imported(file.read_text(), module) for module, file in MODULES.items()}


def area(module):
    """Return the folder, or the file of the top level, that has a floor."""
    return module.split(".")[1]


def violations(imports):
    return [
        f"{module} (floor {FLOORS[area(module)]}) imports {other} (floor {FLOORS[area(other)]})"
        for module, others in imports.items()
        for other in others
        if FLOORS[area(other)] > FLOORS[area(module)]
    ]


def test_every_file_stands_on_a_floor():
    assert {area(module) for module in MODULES} - FLOORS.keys() == set()


def test_every_import_of_the_package_names_a_module_that_exists():
    assert {other for others in IMPORTS.values() for other in others} - MODULES.keys() == set()


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_what_is_imported_from_the_package_exists(folder):
    """What the fork server can't import it leaves out without a word, and every rank of the tests then imports for seconds."""
    files = sorted((PACKAGE.parent / folder).glob("*.py"))
    unknown = {file.name: sorted(imported(file.read_text(), "") - MODULES.keys()) for file in files}
    assert {name: modules for name, modules in unknown.items() if modules} == {}


def test_files_import_from_their_own_and_lower_floors_only():
    assert violations(IMPORTS) == []


def test_no_imports_go_in_circles():
    list(graphlib.TopologicalSorter(IMPORTS).static_order())


def test_folders_import_nothing_by_themselves():
    assert {module: IMPORTS[module] for module, file in MODULES.items() if file.name == "__init__.py" and IMPORTS[module]} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from dist_vsd.training.state import build_state",
        "from dist_vsd.training import state",
        "import dist_vsd.training.state",
        "from ..training import state",
        "def lazy():\n    from dist_vsd.training.state import build_state",
        "if TYPE_CHECKING:\n    from dist_vsd.training.state import TrainingState",
    ],
)
def test_an_import_upwards_is_seen_in_whatever_way_it_is_written(source):
    found = imported(source, "dist_vsd.particles.image")
    assert found == {"dist_vsd.training.state"}
    assert len(violations({"dist_vsd.particles.image": found})) == 1


def test_a_circle_is_seen():
    circle = {"dist_vsd.a": {"dist_vsd.b"}, "dist_vsd.b": {"dist_vsd.a"}}
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(circle).static_order())
