"""particles/placement.py and micro-batches: where particles are kept, and how they are batched, changes no result."""

import dataclasses

import pytest
import torch

from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.particles.placement import Offloaded
from dist_vsd.runs.checkpoint import newest_valid, restore, save
from dist_vsd.training.state import build_state, phi_tensors
from dist_vsd.training.update import update
from tests.runs import gradients_taken

TINY = {
    "prompt": "a green duck",
    "num_particles": 5,
    "num_updates": 3,
    "micro_batch_size": 2,
    "field": {"num_samples": 8, "dense_grid": {"resolutions": [6]}, "occupancy_every": 2},
}
CONFIG = merge(load_preset("embedded"), TINY, "test")
OFFLOADED = merge(CONFIG, {"particles": {"offload": True}}, "test")
CPU = torch.device("cpu")


def after(config, num_updates, **layout):
    """Return a state after some updates."""
    state = build_state(config, Layout.of(config.num_particles, **layout), CPU)
    for index in range(num_updates):
        update(state, index)
    return state


def everything(state):
    tensors = {f"{p.id}/{name}": t.clone() for p in state.particles for name, t in p.tensors().items()}
    return tensors | {name: t.detach().clone() for name, t in phi_tensors(state).items()}


@pytest.fixture(scope="module")
def plain():
    return everything(after(CONFIG, 3))


def test_offloading_changes_no_bit_and_keeps_two_micro_batches_at_most(plain):
    state = after(OFFLOADED, 3)
    placement = state.placement
    assert isinstance(placement, Offloaded)
    assert placement.resident == set()
    assert placement.most_resident == 4  # the two that render and the two that are brought, of five
    offloaded = everything(state)
    assert offloaded.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(plain[name], offloaded[name])] == []


def test_an_idle_particle_holds_the_hosts_memory_and_no_gradient():
    state = after(OFFLOADED, 1)
    for particle in state.particles:
        host = {tensor.data_ptr() for tensor in state.placement._host[particle.id].values()}
        assert {parameter.data_ptr() for parameter in particle.theta.parameters()} <= host
        assert all(parameter.grad is None for parameter in particle.theta.parameters())


def test_an_offloaded_run_goes_on_to_the_bit_from_a_checkpoint_of_a_plain_one(tmp_path, plain):
    save(after(CONFIG, 2), tmp_path, 2)
    state = build_state(OFFLOADED, Layout.of(5), CPU)
    restore(state, newest_valid(tmp_path, OFFLOADED)[0])
    update(state, 2)
    resumed = everything(state)
    assert [name for name in plain if not torch.equal(plain[name], resumed[name])] == []


def test_the_size_of_micro_batches_changes_only_the_rounding(plain):
    """One update: a first step of Adam is +-lr, also where the gradient is noise, so the moments are compared."""
    states = [after(dataclasses.replace(CONFIG, micro_batch_size=size), 1) for size in (1, 5)]
    one, five = (everything(state) | state.phi.moments() for state in states)
    compared = [n for n in one if n.endswith("exp_avg")]
    assert sum("lora_" in n for n in compared) > 40
    for name in compared:
        assert (one[name] - five[name]).norm() <= 1e-4 * one[name].norm(), name


def test_an_update_with_several_views_steps_each_particle_once_on_their_mean():
    config = dataclasses.replace(CONFIG, num_particles=1, micro_batch_size=1)
    state = build_state(config, Layout.of(1, num_views=3), CPU)
    together = gradients_taken(state.particles[0])
    report = update(state, 0)
    assert len(report.figures["theta/gradient_norm"]) == 1
    assert len(report.figures["theta/score_gradient_norm"]) == 3
    (particle,) = state.particles
    assert {int(s["step"]) for s in particle.optimizer.state.values()} == {1}
    singles = []
    for view in range(3):  # each rank of three that share the particle renders one of them
        alone = build_state(config, Layout.of(1, num_views=3), CPU)
        alone = dataclasses.replace(alone, layout=dataclasses.replace(alone.layout, world_size=3, rank=view))
        singles.append(gradients_taken(alone.particles[0]))
        update(alone, 0)
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, sum(single[name] for single in singles), rtol=1e-4, atol=1e-7 * float(gradient.abs().max()))
