"""A shot of two views, which a prior scores together: nothing of an update, a layout or a checkpoint may tear it apart."""

import dataclasses

import pytest
import torch

from dist_vsd.cameras import Cameras
from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout, Shot
from dist_vsd.priors.table import PRIORS, load_prior
from dist_vsd.training.draws import draw_cameras, draw_noise, draw_phi_t, draw_t
from dist_vsd.training.encoded_renders import EncodedRenders
from dist_vsd.training.state import build_state
from dist_vsd.training.update import update
from tests.ranks import run_ranks
from tests.runs import TINY, checkpoint, gradients_taken
from tests.test_ranks import different, parameters, relative_difference
from tests.two_views import ROW, VIEWS

SETTINGS = {
    "prompt": "a green duck", "prior": "two-views", "num_particles": 3, "num_updates": 4, "render_size": 8, "micro_batch_size": 2,
    "field": {"num_samples": 8, "dense_grid": {"resolutions": [6]}}, "regularization": {"opacity": 0.5},
}  # fmt: skip
WORDS = ["a green duck", *TINY, "--prior", "two-views", "--num-particles", "3", "--num-updates", "4", "--render-size", "8"]


@pytest.fixture(autouse=True)
def two_views(monkeypatch):
    monkeypatch.setitem(PRIORS, "two_views", ROW)


def state_of(num_views=4, **changes):
    config = merge(load_preset("embedded"), SETTINGS | {"num_views": num_views} | changes, "test")
    return build_state(config, Layout.of(config.num_particles, num_views=num_views, views_per_shot=VIEWS), torch.device("cpu"))


def test_the_views_of_a_shot_attend_to_one_another():
    prior = load_prior("two-views")
    x_t, y = torch.randn(4, *prior.latent_shape, generator=torch.Generator().manual_seed(0)), prior.embed(["a duck"] * 4).cond
    t = torch.full((4,), 50)
    together = prior.predict(x_t, t, y, Cameras.none(4))
    changed = prior.predict(x_t + torch.tensor([0.0, 1.0, 0.0, 0.0]).view(4, 1, 1, 1), t, y, Cameras.none(4))
    moved = (together - changed).abs().amax((1, 2, 3)) > 1e-4
    assert moved.tolist() == [True, True, False, False]


def test_the_cameras_of_a_shot_stand_evenly_around_and_share_the_rest_and_t():
    config, shots = merge(load_preset("embedded"), SETTINGS, "test"), [Shot(0, 0, 4), Shot(0, 1, 4)]
    for shot in (draw_cameras(config, one, 0) for one in shots):
        assert len(shot) == 4
        turned = torch.remainder(shot.azimuth_deg - shot.azimuth_deg[0], 360.0)
        torch.testing.assert_close(turned, torch.tensor([0.0, 90.0, 180.0, 270.0]).double())
        assert len(shot.elevation_deg.unique()) == len(shot.fov.unique()) == 1
        torch.testing.assert_close(shot.c2w[:, :3, 3].norm(dim=1), shot.c2w[:1, :3, 3].norm().expand(4))
    process = load_prior("two-views").process
    pairs = [[draw(shot) for shot in shots] for draw in (
        lambda shot: draw_t(config, shot, 0, 0.0, process), lambda shot: draw_phi_t(config, shot, 0, 0, process)
    )]  # fmt: skip
    for first, second in pairs:
        assert [len(t.unique()) for t in (first, second)] == [1, 1]
        assert first[0] != second[0]
    eps = torch.cat([draw_noise(config, "noise", shot, 0, (3, 8, 8)) for shot in shots])
    assert len({tuple(row.flatten()[:3].tolist()) for row in eps}) == 8  # noise is each view's own


def test_the_first_view_of_a_shot_is_drawn_as_a_single_view_is():
    config = merge(load_preset("embedded"), SETTINGS, "test")
    one, four = draw_cameras(config, Shot(2, 1), 3), draw_cameras(config, Shot(2, 1, 4), 3)
    assert torch.equal(one.c2w, four.c2w[:1])


def test_a_shot_of_which_one_view_is_not_finite_teaches_phi_nothing():
    x_0 = torch.ones(4, 3, 2, 2)
    x_0[1, 0, 0, 0] = float("nan")
    renders = EncodedRenders.of([Shot(0, 0, 2), Shot(1, 0, 2)], x_0, torch.zeros(4, 16), Cameras.none(4))
    assert renders.weight.tolist() == [0, 0, 1, 1]
    assert renders.x_0[:2].abs().sum() == 0


@pytest.mark.parametrize("objective", ["vsd", "sds", "denoising"])
def test_micro_batches_do_not_change_an_update(objective):
    """In fp32 a mean over other batches rounds otherwise, by 1e-7 relative; Adam's first steps keep the sign of every gradient."""
    one, all_ = (state_of(objective=objective, micro_batch_size=size) for size in (2, 12))
    for state in (one, all_):
        for index in range(2):
            update(state, index)
    for a, b in zip(one.particles, all_.particles, strict=True):
        theirs = dict(b.theta.named_parameters())
        for name, parameter in a.theta.named_parameters():
            torch.testing.assert_close(parameter, theirs[name], rtol=1e-3, atol=1e-4)


def test_an_update_is_the_mean_over_its_views():
    """Two shots of a particle pull on it as the mean of what each pulls by itself: SDS and a regulariser, at the same draws."""
    gradients = {}
    for numbers in ((0,), (1,), (0, 1)):
        state = state_of(num_views=VIEWS * len(numbers), objective="sds", num_particles=1)
        if numbers == (1,):
            state = dataclasses.replace(state, layout=_SecondShot(*dataclasses.astuple(state.layout)))
        taken = gradients_taken(state.particles[0])
        update(state, 0)
        gradients[numbers] = torch.cat([gradient.flatten() for gradient in taken.values()])
    torch.testing.assert_close(gradients[0, 1], (gradients[0,] + gradients[1,]) / 2, rtol=1e-4, atol=1e-6)


class _SecondShot(Layout):
    shots = range(1, 2)
    num_shots = 2


@pytest.mark.parametrize("reuse_pass", [False, True])
def test_phi_learns_from_shots(reuse_pass):
    state = state_of(score={"reuse_pass": reuse_pass, "lr": 1e-2, "num_warmup_updates": 1})
    before = {name: tensor.clone() for name, tensor in state.phi.tensors().items()}
    report = update(state, 0)
    assert all(torch.isfinite(torch.as_tensor(v)).all() for values in report.figures.values() for v in values)
    assert any(not torch.equal(before[name], tensor) for name, tensor in state.phi.tensors().items())


def run(folder, words, **options):
    code, output = run_ranks([*WORDS, *words, "--run-dir", str(folder)], extension="tests.two_views:install", **options)
    assert code == 0, output
    return checkpoint(folder, 4)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    views = ["--num-views", "4"]
    return {"plain": run(folder / "plain", views), "deterministic": run(folder / "deterministic", [*views, "--deterministic"])}


@pytest.mark.parametrize(("num_ranks", "shards"), [(2, 2), (2, 1)], ids=["particles dealt", "shots dealt"])
def test_the_deterministic_mode_gives_the_same_bits_on_any_layout(tmp_path, one_rank, num_ranks, shards):
    words = ["--num-views", "4", "--num-shards", str(shards), "--deterministic"]
    assert different(one_rank["deterministic"], run(tmp_path / "run", words, num_ranks=num_ranks)) == []


@pytest.mark.parametrize("config", ["cpu", "deepspeed_zero2", "deepspeed_zero3"])
def test_ddp_and_zero_give_the_same_particles(tmp_path, one_rank, config):
    """3 particles on 2 ranks, so that one rank joins in a pass of the other's."""
    found = run(tmp_path / "run", ["--num-views", "4", "--num-shards", "2"], num_ranks=2, config=config)
    assert relative_difference(parameters(one_rank["plain"]), parameters(found)) < 1e-4


def test_ranks_that_share_a_particle_take_a_shot_each():
    layouts = [Layout.of(1, 4, rank, views_per_shot=VIEWS) for rank in range(4)]
    assert [list(layout.shots) for layout in layouts] == [[0], [1], [2], [3]]
    assert [list(layout.views) for layout in layouts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layouts[0].num_views == 8


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--num-views", "3"], "this prior scores 2 views together, got num_views 3: use --num-views 2 or 4"),
        (["--representation", "image"], "the prior scores 2 views of an object together, representation image has one"),
    ],
)
def test_what_can_not_be_is_refused(tmp_path, words, says):
    code, output = run_ranks([*WORDS, *words, "--run-dir", str(tmp_path / "run")], extension="tests.two_views:install")
    assert code == 2, output
    assert says in output
    assert not (tmp_path / "run").exists()
