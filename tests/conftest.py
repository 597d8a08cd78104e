"""Fixtures that several files of tests share."""

import gc
import os
import tempfile
from pathlib import Path

import pytest

from tests import warm_python
from tests.runs import unavailable
from tests.slurm_cluster import SlurmCluster, why_not

# Processes that tests start inherit it; the user's own cache stays as it is.
os.environ.setdefault("DIST_VSD_CACHE", tempfile.mkdtemp(prefix="dist_vsd_cache_"))

# The files that take the longest, the longest first, so that the workers of pytest-xdist end together: a file goes to one of them.
LONGEST = (
    "slurm", "pythons", "ranks", "docs", "launch_lines", "bench_gpu", "rehearsal", "compare", "rank_death", "flat_particles", "sweep_run",
    "out_of_memory", "heartbeat", "counted_memory", "distributed", "stages", "compiled", "wandb", "theory", "bench", "prior_loading",
    "kernels_compiled", "sweep_page", "cli_bad_input", "preview", "embedded_prior", "view", "mesh_stages", "viewers", "evaluation_command",
    "lab", "resume", "growing_particle", "shot", "placement", "recipe", "launch", "update_options", "checkpoint", "wandb_sweeps",
    "sweep_lease", "loss_scale", "clip_of_figures", "export_formats",
)  # fmt: skip
# The class `quick`, by file: closed forms, formats and refusals, for those who edit; 90 seconds on one core together. What starts servers,
# ranks or whole runs is not among them.
QUICK = {
    "atlas", "background", "cameras", "captions", "channels", "checkpoint", "cli_bad_input", "config", "dashboard", "device", "encodings",
    "evaluation_closed_forms", "export", "floors", "gaussian_mixture", "given_mesh", "glb", "guidance", "help", "hidden_space",
    "image_particle", "iso_level", "kernels_choice", "kernels_compositing", "kernels_hash_encoding", "kernels_packing",
    "kernels_rasterization", "kernels_sampling", "kernels_waits", "layout", "mesh", "mesh_pictures", "metrics", "page_meshes", "plan",
    "process", "protocols", "radiance_field", "random", "rasterization", "run_directory", "scenes", "serialization", "shapes", "sweep_plan",
    "sweep_prompts", "sweep_status", "tetrahedra", "textured_mesh", "timesteps", "update_gradient", "volume_rendering", "wandb_sweeps",
    "window",
}  # fmt: skip


def pytest_configure(config):
    """Make the place of the warm Python, one for all workers; it starts when a test first asks for it."""
    if not hasattr(config, "workerinput"):
        warm_python.make_folder()


def pytest_unconfigure(config):
    gc.unfreeze()  # or libraries take what is left at the end for leaks
    if not hasattr(config, "workerinput"):
        warm_python.remove_folder()


def pytest_ignore_collect(collection_path, config):
    """Leave the other files unread where the class `quick` alone is asked for: it needs neither DeepSpeed nor matplotlib."""
    is_file_of_tests = collection_path.name.startswith("test_")
    return True if config.option.markexpr == "quick" and is_file_of_tests and name_of(collection_path) not in QUICK else None


def pytest_collection_modifyitems(items):
    """Mark the class `quick`, and begin with what takes the longest."""
    for item in items:
        if name_of(item.path) in QUICK:
            item.add_marker("quick")
    items.sort(key=lambda item: LONGEST.index(name) if (name := name_of(item.path)) in LONGEST else len(LONGEST))


def pytest_collection_finish():
    """Let no garbage collection look through what was imported: that takes half a second each time."""
    gc.collect()
    gc.freeze()


def name_of(file):
    """Return the name of a file of tests: layout of test_layout.py."""
    return Path(file).stem.removeprefix("test_")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A real Slurm of two nodes with two GPUs each, every node in a network of its own; skipped where it can't be had, in CI never."""
    if reason := why_not():
        unavailable(reason)
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), networks=True) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def four_views(tmp_path_factory):
    """The folder of a random prior of a few thousand weights that scores four views together."""
    from tests.tiny_pipelines import write_multi_view

    return str(write_multi_view(tmp_path_factory.mktemp("four_views") / "pipeline"))


@pytest.fixture(scope="session")
def random_flow(tmp_path_factory):
    """The folder of a random Stable Diffusion 3 of a few thousand weights."""
    from tests.tiny_flows import write_flow

    return str(write_flow("sd3", tmp_path_factory.mktemp("random_flow") / "pipeline"))


@pytest.fixture(scope="session")
def random_prior(tmp_path_factory):
    """The folder of a random Stable Diffusion 2.1-base of a few thousand weights."""
    from tests.tiny_pipelines import build_pipeline

    folder = tmp_path_factory.mktemp("random_prior")
    build_pipeline("sd2", folder / "parts").save_pretrained(folder / "pipeline")
    return str(folder / "pipeline")
