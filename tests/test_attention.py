"""Back ends of attention: the same numbers, phi on the same projections, and refusals of what is not there."""

import importlib.machinery
import sys
import types

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dist_vsd.priors import attention, attention_names
from dist_vsd.priors.attention import AttentionBy, flash, use_attention
from dist_vsd.priors.attention_names import require_attention, why_not
from dist_vsd.priors.table import PRIORS, load_prior, prior_row
from dist_vsd.score.lora_score import LoraScore
from dist_vsd.score.score_config import ScoreConfig
from tests.two_views import ROW


def softmax_attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v by head, (B, N, H, d): what all of them compute."""
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


def math(q, k, v):
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def score_of(attend):
    prior = load_prior("random:tiny")
    if attend is not None:
        prior.unet.set_attn_processor(AttentionBy(attend))
    score = LoraScore(prior.network, ScoreConfig(), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in score.phi().items():
            parameter.add_(0.1 if "lora_B" in name else 0.0)
    return prior, score


def answers(prior, score):
    """Return what the prior and phi predict, and phi's gradients."""
    x_t, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([20, 700])
    y, pose = prior.embed(["a duck", "a car"]).cond, torch.ones(2, 16)
    predicted = score(x_t, t, y, pose)
    predicted.square().sum().backward()
    return [prior.predict(x_t, t, y), predicted.detach(), *(parameter.grad for parameter in score.phi().values())]


@pytest.mark.parametrize("attend", [softmax_attention, math, flash])
def test_every_back_end_gives_sdpas_numbers_and_gradients(attend):
    """To rounding of fp32 sums of 64 terms; torch has a flash kernel for the CPU too."""
    (prior, score), (other, others_score) = score_of(None), score_of(attend)
    assert list(score.phi()) == list(others_score.phi())
    for expected, found in zip(answers(prior, score), answers(other, others_score), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.fixture
def pretended(monkeypatch):
    """An xformers that computes by the definition; its calls are kept."""
    calls, module, ops = [], types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    module.__spec__ = importlib.machinery.ModuleSpec("xformers", None)

    def memory_efficient_attention(q, k, v):
        calls.append(q.shape)
        return softmax_attention(q, k, v)

    ops.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", module)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return calls


def test_xformers_is_really_used_by_every_attention_of_prior_and_phi(pretended):
    prior = load_prior("random:tiny", attention="xformers")
    others = load_prior("random:tiny")
    score, others_score = (LoraScore(one.network, ScoreConfig(), torch.Generator().manual_seed(0)) for one in (prior, others))
    found, expected = answers(prior, score), answers(others, others_score)
    num_attentions = sum(name.endswith(("attn1", "attn2")) for name, _ in prior.unet.named_modules())
    assert len(pretended) == 2 * num_attentions > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()) + 1e-12)
    prior.network_of("random:tiny")(torch.zeros(1, 4, 8, 8), torch.tensor([5]), prior.embed(["a duck"]).cond)
    assert len(pretended) == 3 * num_attentions  # phi's own UNet attends alike


def test_sdpa_is_diffusers_own_and_can_be_come_back_to():
    prior = load_prior("random:tiny")
    before = {type(processor) for processor in prior.unet.attn_processors.values()}
    use_attention(prior.unet, "flash")
    assert {processor.attend for processor in prior.unet.attn_processors.values()} == {flash}
    use_attention(prior.unet, "sdpa")
    assert {type(processor) for processor in prior.unet.attn_processors.values()} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["xformers", "flash"])
def test_what_is_not_there_is_refused_in_one_line_that_says_what_to_do(name):
    with pytest.raises(ValueError, match=f"attention '{name}' can't be used: .*leave --attention out") as error:
        require_attention(name, "bf16")
    assert "\n" not in str(error.value)


def test_kernels_that_fail_when_they_are_tried_are_not_there(monkeypatch, pretended):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, dtype: torch.full(shape, 0.0, dtype=dtype))
    assert why_not("xformers", "fp32") == ""
    assert "not in fp32" in why_not("flash", "fp32")
    assert "not in fp32" in why_not("flash", "")

    def fails(*_):
        raise NotImplementedError("No operator found\n for this input")

    monkeypatch.setitem(attention.ATTEND, "xformers", fails)
    assert why_not("xformers", "bf16") == "its kernels don't run here (No operator found for this input)"


def test_a_prior_without_a_choice_of_attention_says_so(monkeypatch):
    monkeypatch.setitem(PRIORS, "two_views", ROW)
    with pytest.raises(ValueError, match="attention must be sdpa for this prior, got 'flash'"):
        require_attention("flash", "bf16", prior_row("two-views").attentions)


def test_names_and_back_ends_are_the_same():
    assert {"sdpa", *attention.ATTEND} == set(attention_names.ATTENTIONS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_flash_kernels_of_a_gpu_give_sdpas_numbers():
    require_attention("flash", "bf16")
    q = torch.randn(2, 64, 4, 64, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(flash(q, q, q), softmax_attention(q.float(), q.float(), q.float()).bfloat16(), rtol=2e-2, atol=2e-2)
