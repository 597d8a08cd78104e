"""Replayed networks: the same bits and gradients as the modules', and only where that is sound."""

import pytest
import torch

from dist_vsd.distributed.random import keyed_generator
from dist_vsd.priors import replay
from dist_vsd.priors.replay import Replayed, record
from dist_vsd.priors.stable_diffusion import StableDiffusionPrior
from dist_vsd.score.lora_score import LoraScore
from dist_vsd.score.score_config import ScoreConfig


@pytest.fixture(scope="module")
def prior():
    return StableDiffusionPrior.load("embedded")


@pytest.fixture
def asked_often(monkeypatch):
    monkeypatch.setattr(replay, "ASKED_BEFORE", 0)


def given(prior, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = prior.embed(["a green duck"]).cond.expand(count)
    return torch.randn(count, *prior.latent_shape, generator=generator), torch.randint(0, 1000, (count,), generator=generator), y


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3])
def test_a_replayed_prior_predicts_the_same_bits_at_other_numbers(prior, asked_often, count):
    prior.predict(*given(prior, count))  # records
    x_t, t, y = given(prior, count, seed=1)
    assert torch.equal(prior.predict(x_t, t, y), prior.network(x_t, t, y))
    assert prior._predicted._recorded


def test_a_replayed_encoder_gives_the_same_gradient(prior, asked_often):
    gradients = []
    for _ in range(2):
        image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        prior.encode(image).square().sum().backward()
        gradients.append(image.grad)
    assert prior._means._recorded
    assert torch.equal(*gradients)


def test_a_replayed_phi_has_the_same_bits_and_gradients_and_follows_its_weights(asked_often):
    prior = StableDiffusionPrior.load("embedded")
    score = LoraScore(prior.network, ScoreConfig(), keyed_generator(0, "initialize_phi"))
    x_t, t, y = given(prior, 2)
    score(x_t, t, y, torch.rand(2, 16))  # records, at up matrices of zero
    with torch.no_grad():
        for number, parameter in enumerate(score.phi().values()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 10)
    pose, results = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)), []
    for ask in (score, lambda *args: score._ask(*args, None)):
        score.zero_grad()
        predicted = ask(x_t, t, y, pose)
        predicted.square().sum().backward()
        results.append([predicted, *(p.grad.clone() for p in score.phi().values())])
    assert score._repeated._recorded
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.no_grad():
        assert not torch.equal(score(x_t, t, y, pose), prior.predict(x_t, t, y))  # whose adapters stay off


def test_one_that_is_asked_seldom_is_not_recorded():
    function = Replayed(torch.sin)
    for _ in range(replay.ASKED_BEFORE):
        function(torch.ones(2))
    assert not function._recorded
    function(torch.ones(2))
    assert function._recorded
    function.forget()
    assert not function._recorded


def test_other_shapes_and_other_devices_are_not_replayed_by_what_was_recorded(asked_often):
    function = Replayed(lambda x, y: x.reshape(-1) if y is None else x.reshape(-1) + y)
    for x, y in ((torch.ones(2, 2), None), (torch.ones(2, 3), None), (torch.ones(2, 2), torch.ones(4)), (torch.ones(4), None)):
        assert torch.equal(function(x, y), function(x, y))
    assert len(function._recorded) == 4
    assert function(torch.ones(2, device="meta"), None).is_meta
    assert len(function._recorded) == 4


def test_what_returns_its_input_is_left_out():
    def function(x):
        return torch.dropout(x / 1.0, 0.5, False).to(torch.float32) * 2

    flat = record(function, (torch.ones(3),))
    x = torch.rand(3)
    assert torch.equal(flat(x), 2 * x)
