"""The tables of representations and objectives: one row is all that a new one needs, and reading them imports no torch."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from dist_vsd.config import RunConfig
from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.objectives.objective import Cotangents, Objective
from dist_vsd.objectives.table import OBJECTIVES, ObjectiveRow
from dist_vsd.particles.particle import Particle
from dist_vsd.particles.representations import REPRESENTATIONS
from dist_vsd.training.state import build_state
from dist_vsd.training.update import update
from tests.runs import environment


def test_reading_a_configuration_imports_no_torch():
    program = "import sys, dist_vsd.config_files as c; c.load_preset('embedded'); print({'torch', 'nerfacc'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_every_representation_makes_particles_of_its_section_that_do_what_its_row_says(name):
    row = REPRESENTATIONS[name]
    theta = row.particle_class()(row.settings(RunConfig()), torch.Generator().manual_seed(0))
    assert isinstance(theta, Particle)
    assert row.is_latent == theta.is_latent
    assert row.becomes == (type(theta).become is not Particle.become)
    assert row.is_solid == hasattr(theta, "density")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_serves_some_representation_and_has_what_an_update_asks(name):
    row = OBJECTIVES[name]
    assert row.representations
    kind = row.objective_class()
    assert kind.draws_particles == hasattr(kind, "sample")
    assert isinstance(kind.asks_prior, bool)


class Grey(Objective):
    """An objective of a test: pictures shall be grey."""

    asks_prior = False

    def __init__(self, config, prior, score):
        assert score is None

    def cotangents(self, batch):
        images = torch.cat([render.image for render in batch.renders])
        return Cotangents([((images - 0.5).square().sum(), None)], {"grey/difference": (images - 0.5).abs().mean().detach()})


def test_a_new_objective_is_a_class_and_a_row(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "grey", ObjectiveRow(made_by="tests.test_tables:Grey", serves=lambda row: row.is_flat))
    config = merge(load_preset("image"), {"prompt": "a red car", "objective": "grey", "num_particles": 1}, "test")
    state = build_state(config, Layout.of(1), torch.device("cpu"))
    differences = [float(update(state, index).figures["grey/difference"][0]) for index in range(5)]
    assert differences[-1] < 0.5 * differences[0]
    with pytest.raises(ValueError, match="objective grey can't serve representation radiance_field: use --representation image or latent"):
        dataclasses.replace(config, representation="radiance_field")


def test_a_new_representation_is_a_class_and_a_row(monkeypatch):
    row = dataclasses.replace(REPRESENTATIONS["image"], made_by="dist_vsd.particles.siren:SirenParticle", section="siren", becomes=False)
    monkeypatch.setitem(REPRESENTATIONS, "waves", row)
    config = merge(load_preset("siren"), {"prompt": "a red car", "representation": "waves", "num_particles": 1}, "test")
    state = build_state(config, Layout.of(1), torch.device("cpu"))
    assert update(state, 0).figures["theta/gradient_norm"][0] > 0
