"""A rehearsal of runs on a device that is not the CPU (paper_device.py): no tensor is in the wrong place, numbers are the CPU's."""

import contextlib
import dataclasses
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dist_vsd.device
from dist_vsd.cameras import turntable
from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.evaluation.preview import Panel, preview_cameras, render_particles
from dist_vsd.export.surface import find_surface
from dist_vsd.export.turntable import render_views
from dist_vsd.objectives import vsd
from dist_vsd.particles.mesh import MeshParticle
from dist_vsd.particles.representations import CHANNELS
from dist_vsd.priors.clip import EMBEDDED_CLIP_FOLDER
from dist_vsd.priors.table import PRIORS, load_prior, prior_row
from dist_vsd.reporting.stage_figures import StageFigures
from dist_vsd.runs import checkpoint
from dist_vsd.training.loop import train
from dist_vsd.training.state import build_state
from dist_vsd.training.update import update
from tests.coloured_mesh import SETTINGS
from tests.paper_device import DEVICE, OnPaper, PaperTensor, recording
from tests.two_views import ROW

CPU, MAIN, SIDE = torch.device("cpu"), "computation", "side"
ONE_COPY = next(f"device.py:{n}" for n, text in enumerate(inspect.getsource(dist_vsd.device).splitlines(), 1) if "freight.to(" in text)
# A prior of a few thousand weights has every kind of operation that the embedded one has, and fewer of each.
FEW = {"prior": "random:tiny"}
DENSE = {"field": {"num_samples": 8, "dense_grid": {"resolutions": [8]}}, "render_size": 16}
HASH = {"field": {"num_samples": 8, "encoding": "hash", "hash_grid": {"log2_table_size": 8, "num_levels": 4}}, "render_size": 16}
LATENT = FEW | {"latent": {"resolution": 8}}
RUNS = {
    "dense grid": ("embedded", DENSE),
    "hash grid": ("embedded", FEW | HASH),
    "regularisers": ("embedded", FEW | DENSE | {"regularization": {"entropy": 1.0, "weight_entropy": 1.0, "depth_variance": 1.0}}),
    "normals": ("embedded", FEW | DENSE | {"supervise": "normal"}),
    "tracked origin": ("embedded", FEW | {"render_size": 16, "field": DENSE["field"] | {"track_origin": True}}),
    "learned background": ("embedded", FEW | {"render_size": 16, "field": DENSE["field"] | {"background": "learned"}}),
    "Perp-Neg": ("embedded", FEW | DENSE | {"prompting": {"perp_neg": True}}),
    "SDS": ("embedded-sds", FEW | DENSE),
    "CLIP": ("embedded-clip", DENSE),
    "latent": ("latent", {}),
    "image": ("image", {}),
    "siren": ("siren", {}),
    "a rectified flow": ("embedded", {"prior": "random:tiny-sd3"} | DENSE),
    "ancestral of a flow": ("image", {"prior": "random:tiny-sd3", "objective": "ancestral", "ancestral": {"num_steps": 3}}),
    "ancestral": ("latent", {"objective": "ancestral", "ancestral": {"num_steps": 3}}),
    "bf16": ("latent", {"precision": "bf16"}),
    "one pass of phi serves twice": ("latent", LATENT | {"score": {"reuse_pass": True}}),
    "particles that take turns": ("latent", LATENT | {"num_particles": 3, "particles": {"theta_batch": 1, "phi_batch": 2}}),
    "in order": ("latent", LATENT | {"deterministic": True}),
    "offloaded": ("latent", LATENT | {"num_particles": 3, "micro_batch_size": 1, "particles": {"offload": True}}),
    "tiles, budgets, and nothing that is hidden": ("embedded", FEW | {"render_size": 16, "field": HASH["field"] | {
        "samples_per_ray": 4, "visible_per_ray": 3, "hidden_below": 1e-4, "tile_points": 100}}),
    "four views together": ("embedded-multiview", DENSE),
    "mesh": ("embedded", FEW | DENSE | {"representation": "mesh", "mesh": {"resolution": 12}, "supervise": "normal", "objective": "sds",
        "regularization": {"normal_consistency": 1.0, "laplacian": 1.0}}),
    "painted mesh": ("embedded", FEW | DENSE | {"representation": "mesh", "mesh": {"resolution": 12}, "trains": ["encoding", "mlp"]}),
    "two views together": ("embedded", DENSE | {"prior": "two-views", "num_views": 2}),
}


WAITS_OF_A_SURFACE = 8  # the numbers of its vertices, faces, pixels that are hit, edges between faces; each in a render of a particle


def state_of(name, device):
    preset, settings = RUNS[name]
    config = merge(load_preset(preset), {"prompt": "a green duck", "num_particles": 2} | settings, "test")
    views = prior_row(config.prior).views_per_shot
    state = build_state(config, Layout.of(config.num_particles, num_views=views, views_per_shot=views), device)
    for network in (getattr(state.prior, name, None) for name in ("unet", "vae")):
        if network is not None and device == CPU:  # as on a device: Adam's first steps make much of another order of sums
            network.to(memory_format=torch.channels_last)
    return state


def tensors_of(state):
    found = {f"{particle.id}/{name}": tensor for particle in state.particles for name, tensor in particle.tensors().items()}
    found |= state.phi.tensors() if state.phi is not None else {}
    return {name: (tensor.raw if isinstance(tensor, PaperTensor) else tensor).detach().clone() for name, tensor in found.items()}


@pytest.fixture
def two_views(monkeypatch):
    monkeypatch.setitem(PRIORS, "two_views", ROW)


@pytest.mark.parametrize("name", RUNS)
def test_updates_on_the_device_give_the_cpus_numbers(name, two_views):
    """To rounding: a backend has no fused attention, and takes its parts. Adam's first steps keep the sign of every gradient."""
    is_mesh = RUNS[name][1].get("representation") == "mesh"
    expected, num_updates = state_of(name, CPU), 1 if RUNS[name][1].get("field") and not is_mesh else 2
    with OnPaper():
        found = state_of(name, DEVICE)
        for index in range(num_updates):
            with recording() as record:
                update(found, index)
            if name == "offloaded":
                assert record.copies[("in", ONE_COPY)] == 1
                assert sum(record.waits.values()) == 0
            elif is_mesh:
                # The lattice's connections are made in the first update; how large a surface is only the device knows.
                assert index == 0 or dict(record.copies) == {("in", ONE_COPY): 1}
                assert index == 0 or sum(record.waits.values()) <= WAITS_OF_A_SURFACE * len(found.particles)
            elif RUNS[name][1].get("objective") != "ancestral":
                assert dict(record.copies) == {("in", ONE_COPY): 1}, "all that is drawn travels together"
                assert sum(record.waits.values()) == 0
    for index in range(num_updates):
        update(expected, index)
    one, other = tensors_of(expected), tensors_of(found)
    assert one.keys() == other.keys()
    # Of a picture's 12,288 numbers one has a gradient that is rounding alone, and Adam's whole first step follows its sign.
    bound = 1e-2 if name in ("bf16", "image") else 1e-5
    assert max(relative_difference(one, other, part) for part in ("theta", "lora")) < bound


def relative_difference(one, other, part):
    """Return the norm of the difference of all parameters of a kind, over theirs."""
    keys = [key for key in one if part in key and "optimizer" not in key and one[key].is_floating_point()]
    if not keys:
        return 0.0
    a, b = (torch.cat([tensors[key].flatten().float() for key in keys]) for tensors in (one, other))
    return float((a - b).norm() / a.norm())


def test_a_checkpoint_of_the_device_goes_on_there_and_on_the_cpu(tmp_path):
    with OnPaper():
        state = state_of("dense grid", DEVICE)
        update(state, 0)
        checkpoint.save(state, tmp_path, 1)
        found, _ = checkpoint.newest_valid(tmp_path, state.config)
        again = state_of("dense grid", DEVICE)
        checkpoint.restore(again, found)
        update(again, 1)
        update(state, 1)
    on_cpu = state_of("dense grid", CPU)
    checkpoint.restore(on_cpu, found)
    update(on_cpu, 1)
    expected, gone_on = tensors_of(state), tensors_of(again)
    assert [key for key in expected if not torch.equal(expected[key], gone_on[key])] == []
    assert relative_difference(expected, tensors_of(on_cpu), "theta") < 1e-5


def test_what_is_shown_measured_and_exported_is_made_on_the_device():
    states = {}
    for device in (CPU, DEVICE):
        with OnPaper():
            state = state_of("dense grid", device)
            views = render_particles(state, 12)
            figures = Panel(state, EMBEDDED_CLIP_FOLDER).figures(views)
            theta = state.particles[0].theta
            cameras = turntable(2, 15.0, 3.0, 40.0).to(device)
            frames = torch.cat([render_views(theta, cameras, 16, channel=channel) for channel in CHANNELS])
            surface = find_surface(theta, 12, 1.0)
            colors = surface.colors_at(surface.vertices)
        states[device] = views, figures, frames, surface, colors
        assert len(preview_cameras(state, 12)) == 12
    views, figures, frames, surface, colors = states[CPU]
    others_views, others_figures, others_frames, others_surface, others_colors = states[DEVICE]
    torch.testing.assert_close(views, others_views, rtol=0, atol=1e-5)
    assert figures == pytest.approx(others_figures, rel=1e-3, abs=1e-4, nan_ok=True)
    torch.testing.assert_close(frames, others_frames, rtol=0, atol=1e-5)
    assert len(surface.vertices) == len(others_surface.vertices) > 0
    assert np.allclose(colors, others_colors, atol=1e-4)


def test_a_mesh_is_exported_from_the_device():
    made, small = [], dataclasses.replace(SETTINGS, mesh=dataclasses.replace(SETTINGS.mesh, resolution=8))
    for device in (CPU, DEVICE):
        with OnPaper():
            theta = MeshParticle(small, torch.Generator().manual_seed(0)).to(device)
            surface = find_surface(theta, 0)
            made.append((surface.vertices, surface.faces, surface.colors_at(surface.vertices)))
    for one, other in zip(*made, strict=True):
        assert np.allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prior", ["embedded", "random:tiny"])
def test_kernels_and_what_they_make_lie_channels_last_on_an_accelerator_and_not_on_the_cpu(prior):
    def is_last(tensor):
        return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()

    with OnPaper():
        there, here = load_prior(prior, DEVICE), load_prior(prior, CPU)
        made = []
        there.unet.down_blocks[0].register_forward_hook(lambda _module, _inputs, outputs: made.append(outputs[0]))
        y = there.embed(["a duck"]).cond
        there.predict(torch.zeros(1, *there.latent_shape).to(DEVICE), torch.tensor([7]).to(DEVICE), y)
    for network in ("unet", "vae"):
        kernels = [[p for p in getattr(one, network).parameters() if p.ndim == 4 and p[0, 0].numel() > 1] for one in (there, here)]
        assert all(map(is_last, kernels[0]))
        assert not any(map(is_last, kernels[1]))
    assert is_last(made[0])


def test_a_tensor_in_the_wrong_place_is_found():
    with OnPaper(), pytest.raises(RuntimeError, match="a CPU tensor .* meets one on paper"):
        torch.ones(3, device=DEVICE) + torch.ones(3)


def test_copies_and_waits_are_counted():
    with OnPaper(), recording() as record:
        tensor = torch.arange(3.0).to(DEVICE)
        assert float(tensor.sum()) == 3.0
        tensor.cpu()
        assert (tensor > 1).nonzero().shape == (1, 1)
    assert (sum(record.copies.values()), sum(record.waits.values())) == (2, 3)  # read, copied out and counted


class Told:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.lines, self.events = {}, []

    def log(self, update, figures):
        self.lines[update] = figures

    def event(self, update, text):
        self.events.append((update, text))

    def advance(self, update):
        pass


def looped(state, folder, num_updates):
    """Run the loop, without previews; return what it told, and the record of the last two updates: one that is logged, one that is not."""
    told, records = Told(), []

    def preview(_done):
        records.append(stack.enter_context(recording()))

    directory, stop = SimpleNamespace(checkpoints=folder), SimpleNamespace(requested=False)
    with contextlib.ExitStack() as stack:
        preview(0)
        train(state, 0, directory, stop, StageFigures(state, told), preview)
    return told, records[num_updates - 2 : num_updates]


def test_offloaded_particles_travel_beside_the_computation_which_waits_for_each_to_arrive():
    """In the order that the device is told: particle 2 sets out while particle 0 is worked on, and is waited for before its turn."""
    with OnPaper():
        state = state_of("offloaded", DEVICE)
        with recording() as record:
            update(state, 0)
        state.placement.settle()
    told = [(queue, what.split(" of ")[0]) for queue, what in record.order if what != "time"]
    assert set(told) >= {("side", "copy in"), ("side", "copy out"), ("side", "mark"), ("side", "waits for computation")}
    marks, waits = ([place for place, row in enumerate(told) if row == which] for which in ((SIDE, "mark"), (MAIN, "waits for mark")))
    assert len(marks) == 3
    assert len(waits) >= 3
    first_home = told.index((SIDE, "copy out"))
    assert marks[1] < first_home  # the next one is on its way before the first goes home
    for mark, wait in zip(marks, waits, strict=False):
        assert mark < wait
    for place, row in enumerate(told):
        if row == (SIDE, "copy out"):  # a particle goes home when the computation is done with it
            assert (SIDE, "waits for computation") in told[:place]
    brought = [row for row in told if row == (SIDE, "copy in")]
    assert told.count((MAIN, "keeps a tensor")) == len(brought)  # whose memory stays until the computation is done with it


def test_the_loop_waits_once_where_a_line_is_logged_and_else_never(tmp_path, monkeypatch):
    settings = LATENT | {"num_updates": 6, "log_every": 2, "checkpoint_every": 100, "check_every": 100}
    monkeypatch.setitem(RUNS, "logged", ("latent", settings))
    with OnPaper():
        told, (logged, silent) = looped(state_of("logged", DEVICE), tmp_path, num_updates=5)
    expected, _ = looped(state_of("logged", CPU), tmp_path / "cpu", num_updates=5)
    assert [sum(record.waits.values()) for record in (logged, silent)] == [1, 0]
    assert [sum(record.copies.values()) for record in (logged, silent)] == [2, 1]  # the draws; and what is read, all of it
    assert told.lines.keys() == expected.lines.keys() == {2, 4, 6}
    for name, value in expected.lines[4].items():
        if name.startswith(("theta/", "phi/", "score/")):
            assert told.lines[4][name] == pytest.approx(value, rel=1e-4), name
    assert told.lines[4]["seconds/update"] >= told.lines[4]["seconds/scores"] > 0


def test_what_the_device_skipped_is_read_before_a_checkpoint_is_saved_though_no_line_is_logged(tmp_path, monkeypatch):
    settings = LATENT | {"num_updates": 6, "log_every": 100, "checkpoint_every": 3, "check_every": 100, "num_particles": 1}
    monkeypatch.setitem(RUNS, "rarely logged", ("latent", settings))
    gradient = vsd.vsd_gradient
    calls = []

    def spoilt(*arguments):
        calls.append(None)
        return gradient(*arguments) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(vsd, "vsd_gradient", spoilt)
    with OnPaper():
        told, _ = looped(state_of("rarely logged", DEVICE), tmp_path, num_updates=5)
    assert [update for update, _ in told.events] == [3]
    assert "its gradient is not finite; the step is skipped" in told.events[0][1]
