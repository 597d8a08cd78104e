"""A particle that grows: it splits in two at a given update, through Adam, checkpoints, resume and the ranks that share it."""

import dataclasses
import shutil

import pytest
import torch
from torch import nn

from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.particles.owned_particle import OwnedParticle, take_rows
from dist_vsd.particles.particle import Particle, Render
from dist_vsd.particles.representations import REPRESENTATIONS
from dist_vsd.runs.checkpoint import newest_valid, restore, save
from dist_vsd.training.state import build_state
from dist_vsd.training.update import update
from tests.ranks import run_ranks
from tests.runs import checkpoint
from tests.test_ranks import different

SPLITS_AT = 2
ROW = dataclasses.replace(REPRESENTATIONS["image"], made_by="tests.test_growing_particle:Cloud")
WORDS = ["a red car", "--preset", "image", "--objective", "sds", "--num-particles", "1", "--num-views", "4", "--num-updates", "5"]
WORDS += ["--render-size", "8", "--deterministic", "--check-every", "1", "--checkpoint-every", "1", "--keep-checkpoints", "9"]
WORDS += ["--log-every", "1", "--no-turntables"]


def install():
    """Let pictures be clouds; called on every rank."""
    REPRESENTATIONS["image"] = ROW


class Cloud(Particle):
    """Rows of numbers whose mean is the picture; those that the gradient moves most split in two."""

    def __init__(self, config, generator):
        super().__init__()
        self.points = nn.Parameter(torch.randn(3, 3, generator=generator))
        self.register_buffer("pushes", torch.zeros(3))
        self.register_buffer("pushes_of_update", torch.zeros(3))

    def _push(self, gradient):
        self.pushes_of_update.add_(gradient.norm(dim=1))

    def render(self, cameras, size, drawn=None):
        points = self.points * 1.0
        if points.requires_grad:
            points.register_hook(self._push)
        image = points.mean(0).sigmoid().view(1, 3, 1, 1).expand(len(cameras), -1, size, size)
        return Render(image, torch.ones_like(image[:, :1]), image, {})

    def parameter_groups(self):
        return [{"name": "pixels", "params": [self.points], "lr": 0.1}]

    @property
    def statistics(self):
        return [self.pushes_of_update]

    def count(self, totals):
        self.pushes += totals[0]

    def changes_at(self, update):
        return update == SPLITS_AT

    def after_update(self, update, generator, optimizer=None):
        rows = torch.tensor([*range(len(self.points)), int(self.pushes.argmax())])
        take_rows(self, optimizer, "points", rows)
        self.pushes, self.pushes_of_update = torch.zeros(len(rows)), torch.zeros(len(rows))


@pytest.fixture
def config(monkeypatch):
    """A configuration whose pictures are clouds."""
    monkeypatch.setitem(REPRESENTATIONS, "image", ROW)
    settings = {"prompt": "a red car", "num_particles": 1, "num_updates": 5, "render_size": 8, "micro_batch_size": 1}
    return merge(load_preset("image"), settings | {"objective": "sds", "deterministic": True}, "test")


def after(config, num_updates, first=0, state=None):
    state = state or build_state(config, Layout.of(1, num_views=2), torch.device("cpu"))
    for index in range(first, num_updates):
        update(state, index)
    return state


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_row_that_splits_takes_its_moments_along():
    theta = Cloud(None, torch.Generator().manual_seed(0))
    owned = OwnedParticle.of(0, theta)
    theta.render([0], 4).image.sum().backward()
    owned.optimizer.step()
    before = {key: value.clone() for key, value in owned.optimizer.state[theta.points].items()}
    take_rows(theta, owned.optimizer, "points", torch.tensor([0, 1, 2, 1]))
    after_ = owned.optimizer.state[theta.points]
    assert owned.parameters[0] is theta.points
    assert torch.equal(theta.points[3], theta.points[1])
    assert torch.equal(after_["exp_avg"][3], before["exp_avg"][1])
    assert after_["step"] == before["step"]


def test_a_grown_particle_resumes_to_the_bit_from_before_and_after_it_grew(tmp_path, config):
    whole = after(config, 5).particles[0].tensors()
    assert whole["theta/points"].shape == (4, 3)
    for saved in (2, 4):
        save(after(config, saved), tmp_path / str(saved), saved)
        state = build_state(config, Layout.of(1, num_views=2), torch.device("cpu"))
        restore(state, newest_valid(tmp_path / str(saved), config)[0])
        assert same(whole, after(config, 5, saved, state).particles[0].tensors())


def test_a_particle_of_another_size_can_be_put_back_to_its_start(config):
    grown = after(config, 4).particles[0]
    start = build_state(config, Layout.of(1, num_views=2), torch.device("cpu")).particles[0].tensors()
    grown.restore(start)
    assert same(start, grown.tensors())


def on_ranks(folder, num_ranks, words=WORDS):
    code, output = run_ranks([*words, "--run-dir", str(folder)], num_ranks=num_ranks, extension="tests.test_growing_particle:install")
    assert code == 0, output
    return folder


def test_ranks_that_share_a_particle_grow_it_alike_and_as_one_rank_does(tmp_path):
    """What decides is the sum over all renders; --check-every 1 compares the ranks' particles after every update."""
    one, two = on_ranks(tmp_path / "one", 1), on_ranks(tmp_path / "two", 2)
    assert checkpoint(one, 5)["particles/0000.safetensors:theta/points"].shape == (4, 3)
    assert different(checkpoint(one, 5), checkpoint(two, 5)) == []


@pytest.mark.parametrize("saved", [2, 4], ids=["before it grew", "after it grew"])
def test_it_resumes_to_the_bit_on_ranks_that_share_it_and_moves_from_one_rank_to_two(tmp_path, saved):
    whole = checkpoint(on_ranks(tmp_path / "one", 1), 5)
    for update_ in range(saved + 1, 6):
        shutil.rmtree(tmp_path / "one" / "checkpoints" / f"update_{update_:08d}")
    moved = on_ranks(tmp_path / "one", 2, ["--resume"])
    assert different(whole, checkpoint(moved, 5)) == []
