"""Stable Diffusion's architectures at their real sizes: published numbers of parameters, and priors with random weights."""

import pytest
import torch

from dist_vsd.priors.architecture_names import SIZES
from dist_vsd.priors.architectures import ARCHITECTURES, RandomPrior, build_unet, build_vae
from dist_vsd.priors.flow_architectures import FLOW_ARCHITECTURES
from dist_vsd.priors.table import load_prior, prior_row

# UNets: as counted in the published checkpoints (859.5, 865.9 and 2,567.5 M); the three have the same VAE.
UNETS = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}
VAE = 83_653_863


def num_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("size", UNETS)
def test_networks_have_the_published_numbers_of_parameters(size):
    assert num_parameters(build_unet(size, "meta")) == UNETS[size]
    assert num_parameters(build_vae(size, "meta")) == VAE


def test_names_and_architectures_are_the_same():
    assert (*ARCHITECTURES, *FLOW_ARCHITECTURES) == SIZES


@pytest.mark.parametrize("size", UNETS)
def test_a_prior_of_real_size_answers_with_the_published_shapes_on_the_meta_device(size):
    prior = RandomPrior(size, "meta", torch.bfloat16)
    side = prior.image_size
    assert (side, prior.latent_shape) == ((1024, (4, 128, 128)) if size == "sdxl" else (512, (4, 64, 64)))
    y = prior.embed(["a duck"])
    x_0 = prior.encode(torch.empty(1, 3, side, side, device="meta"))
    predicted = prior.predict(x_0, torch.empty(1, dtype=torch.int64, device="meta"), y.cond)
    assert x_0.shape == predicted.shape == (1, *prior.latent_shape)
    assert (x_0.dtype, predicted.dtype) == (torch.float32, torch.float32)


def test_a_random_prior_is_the_same_wherever_it_is_built_and_finite():
    one, other = (load_prior("random:tiny") for _ in range(2))
    image, t = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])
    x_0 = one.encode(image)
    assert torch.equal(x_0, other.encode(image))
    y = one.embed(["a duck", "a car"])
    assert not torch.equal(y.cond.tokens[0], y.cond.tokens[1])
    assert torch.equal(y.cond.tokens, other.embed(["a duck", "a car"]).cond.tokens)
    predicted = one.predict(x_0, t, y.cond)
    assert torch.equal(predicted, other.predict(x_0, t, y.cond))
    assert predicted.isfinite().all()
    assert predicted.std() > 0.01
    assert not torch.equal(one.network_of("random:tiny")(x_0, t, y.cond), predicted)  # another checkpoint's


def test_xls_vae_stays_in_fp32_where_fp16_is_asked_for():
    prior = RandomPrior("sdxl", "meta", torch.float16)
    assert (prior.unet.dtype, prior.vae.dtype) == (torch.float16, torch.float32)
    assert RandomPrior("sdxl", "meta", torch.bfloat16).vae.dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "phi", "words"), [
    ("random:sd22", "", "did you mean random:sd21"),
    ("random:sd21", "random:sd15", "phi's prior must be random:sd21"),
])  # fmt: skip
def test_wrong_names_are_refused_in_one_line(name, phi, words):
    with pytest.raises(ValueError, match=words) as error:
        prior_row(name).check(name, ["a duck"], phi)
    assert "\n" not in str(error.value)
