"""What a run's end leaves: a mesh of each solid that has a surface, and an event for each that has none."""

import pytest
import torch
import trimesh

from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.export.end_of_run import write_meshes
from dist_vsd.training.state import build_state

FIELD = {"dense_grid": {"resolutions": [8]}, "num_samples": 16, "occupancy_resolution": 16}


class Told:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.events, self.shown = [], []

    def event(self, _update, text):
        self.events.append(text)

    def show(self, _update, files):
        self.shown.append(files)


@pytest.mark.parametrize("representation", ["radiance_field", "mesh"])
def test_a_mesh_is_left_of_each_solid_and_one_without_a_surface_is_told(tmp_path, representation):
    settings = {"prompt": "a green duck", "num_particles": 2, "field": FIELD, "mesh": {"resolution": 16}, "objective": "sds"}
    config = merge(load_preset("embedded"), settings | {"representation": representation}, "test")
    state, told = build_state(config, Layout.of(2), torch.device("cpu")), Told()
    nothing = state.particles[1].theta
    if representation == "mesh":
        nothing.set_distances(torch.ones(17, 17, 17))
    else:
        nothing.occupancy.binaries.fill_(False)
    write_meshes(state, tmp_path, told)
    assert told.shown == [{"media/mesh": ["export/mesh_0000.glb"]}]
    (event,) = told.events
    reason = {"mesh": "its mesh has shrunk to nothing", "radiance_field": "nothing is"}[representation]
    assert event.startswith(f"particle 1 has no mesh: {reason}")
    (mesh,) = trimesh.load(tmp_path / "export" / "mesh_0000.glb", process=False).geometry.values()
    assert mesh.is_watertight
    assert not (tmp_path / "export" / "mesh_0001.glb").exists()
