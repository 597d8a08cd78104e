"""Keys and values of the text: computed once a text, the same predictions."""

import pytest
import torch

from dist_vsd.priors.prior import Text, eps_pretrain
from dist_vsd.priors.table import load_prior
from dist_vsd.priors.text_projections import TextLinear
from dist_vsd.score.lora_score import LoraScore
from dist_vsd.score.score_config import ScoreConfig


@pytest.fixture
def prior():
    return load_prior("random:tiny")


def inputs(count=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, 8, 8, generator=generator), torch.tensor([20, 700])[:count]


def plain(text):
    return Text(text.tokens, text.pooled)


def test_predictions_are_those_of_a_network_that_computes_them_in_every_pass(prior):
    (x_t, t), y = inputs(), prior.embed(["a duck", "a car"])
    expected = prior.predict(x_t, t, plain(y.cond))
    torch.testing.assert_close(prior.predict(x_t, t, y.cond), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(prior.predict(x_t, t, y.cond[[1, 0]]), prior.predict(x_t, t, plain(y.cond[[1, 0]])), rtol=0, atol=1e-5)


def test_a_pass_projects_no_text(prior, monkeypatch):
    (x_t, t), y = inputs(), prior.embed(["a duck", "a car"])
    projected = []
    linear = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda layer, x: (projected.append(isinstance(layer, TextLinear)), linear(layer, x))[1])
    eps_pretrain(prior, x_t, t, y, 7.5)
    assert not any(projected)
    assert len(projected) > 0
    prior.predict(x_t, t, plain(y.cond))
    assert sum(projected) == len([m for m in prior.unet.modules() if isinstance(m, TextLinear)]) > 0


def test_keys_and_values_of_mixed_texts_are_mixed_alike(prior):
    y, (x_t, t) = prior.embed(["a duck", "a car"]), inputs()
    mixed = y.cond[[0, 0]].lerp(y.cond[[1, 1]], torch.tensor([0.25, 0.9]))
    torch.testing.assert_close(mixed.projected, prior.network.projected(plain(mixed)).projected, rtol=0, atol=1e-5)
    torch.testing.assert_close(prior.predict(x_t, t, mixed), prior.predict(x_t, t, plain(mixed)), rtol=0, atol=1e-5)


def test_eps_phi_adds_its_own_to_them(prior):
    (x_t, t), y = inputs(), prior.embed(["a duck", "a car"])
    score = LoraScore(prior.network, ScoreConfig(), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in score.phi().items():
            parameter.add_(0.1 if "lora_B" in name else 0.0)
    pose = torch.zeros(2, 16)
    found = score(x_t, t, y.cond, pose)
    torch.testing.assert_close(found, score(x_t, t, plain(y.cond), pose), rtol=0, atol=1e-5)
    assert (found - prior.predict(x_t, t, y.cond)).abs().max() > 1e-3


def test_another_network_of_phis_does_not_take_the_teachers(prior):
    (x_t, t), y = inputs(), prior.embed(["a duck", "a car"])
    other = prior.network_of("random:tiny")
    assert torch.equal(other(x_t, t, y.cond), other(x_t, t, plain(y.cond)))


def test_texts_with_and_without_them_are_joined_without():
    with_them, without = Text(torch.ones(1, 3, 2), None, torch.ones(1, 5)), Text(torch.ones(2, 3, 2))
    assert Text.cat([with_them, with_them]).projected.shape == (2, 5)
    assert Text.cat([with_them, without]).projected is None
    assert with_them.expand(4).projected.shape == (4, 5)
