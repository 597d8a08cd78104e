"""Fixtures that several files of tests share."""

import os
import tempfile

import pytest

from tests.runs import unavailable
from tests.slurm_cluster import SlurmCluster, why_not

# Processes that tests start inherit it; the user's own cache stays as it is.
os.environ.setdefault("DIST_VSD_CACHE", tempfile.mkdtemp(prefix="dist_vsd_cache_"))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A real Slurm of two nodes with two GPUs each, every node in a network of its own; skipped where it can't be had, in CI never."""
    if reason := why_not():
        unavailable(reason)
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), networks=True) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def random_prior(tmp_path_factory):
    """The folder of a random Stable Diffusion 2.1-base of a few thousand weights."""
    from tests.tiny_pipelines import build_pipeline

    folder = tmp_path_factory.mktemp("random_prior")
    build_pipeline("sd2", folder / "parts").save_pretrained(folder / "pipeline")
    return str(folder / "pipeline")
