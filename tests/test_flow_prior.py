"""Priors that are rectified flows against diffusers' own pipelines, on tiny ones of each kind, and phi on them."""

import contextlib
import io

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import nn

from dist_vsd.cameras import Cameras
from dist_vsd.diffusion.process import RectifiedFlow, add_noise
from dist_vsd.priors.flow import FlowPrior
from dist_vsd.priors.flow_config import FlowConfig
from dist_vsd.priors.flux import packed, unpacked
from dist_vsd.priors.prior import Text, TextEmbeddings, eps_pretrain, guided_prediction
from dist_vsd.priors.sampling import sample
from tests.tiny_flows import (
    CHANNELS,
    FLOWS,
    IMAGE_SIZE,
    LATENT_SIZE,
    LONG_TOKENS,
    LONG_WIDTH,
    SCALING_FACTOR,
    SHIFT_FACTOR,
    WIDTH,
    WIDTH_2,
    build_flux,
    build_sd3,
    write_flow,
)

PROMPTS, NEGATIVE = ["a red car", "a blue duck, front view"], "a green house"
SHIFTS = {"sd3": 3.0, "flux": 1.5830842480788643, "sana": 3.0}  # FLUX: exp(0.5 + 0.65 (16 - 256) / 3840), of 16 tokens


@pytest.fixture(scope="module", autouse=True)
def no_cache(tmp_path_factory):
    """Embed anew, whatever earlier versions kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIST_VSD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline of each kind; sd35: with dual attention; clip: Stable Diffusion 3 with one CLIP alone; no_t5: without T5."""
    root = tmp_path_factory.mktemp("flows")
    for kind in FLOWS:
        write_flow(kind, root / kind)
    torch.manual_seed(5)
    write_flow("sd3", root / "sd35", build_sd3(root / "sd35_parts", dual=(0,)))
    write_flow("sd3", root / "clip", build_sd3(root / "clip_parts", ("clip",)), t5_tokens=0)
    write_flow("sd3", root / "no_t5", build_sd3(root / "no_t5_parts", ("clip", "clip_2")))
    write_flow("flux", root / "schnell", build_flux(root / "schnell_parts", guidance_embeds=False))
    return root


@pytest.fixture(scope="module")
def priors(folders):
    return {kind: FlowPrior.load(str(folders / kind)) for kind in FLOWS}


@pytest.fixture(scope="module")
def exact(folders):
    """The same priors in fp64."""
    return {kind: FlowPrior.load(str(folders / kind), dtype=torch.float64) for kind in FLOWS}


def pipeline_of(folder):
    """Return diffusers' pipeline with its long text encoder in bf16, as ours computes it."""
    nothing = {"text_encoder_3": None, "tokenizer_3": None} if folder.name == "no_t5" else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **nothing)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        encoder = getattr(pipeline, name, None)
        if encoder is not None and "CLIP" not in type(encoder).__name__:
            encoder.to(torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipelines_texts(kind, pipeline):
    """Return the embeddings that diffusers' pipeline makes of PROMPTS and NEGATIVE."""
    options = {"do_classifier_free_guidance": True, "max_sequence_length": LONG_TOKENS}
    if kind == "sana":
        instruction = {"complex_human_instruction": default_of(pipeline, "complex_human_instruction")}
        cond, mask, uncond, uncond_mask = pipeline.encode_prompt(PROMPTS, negative_prompt=NEGATIVE, **options, **instruction)
        return Text(cond.float(), mask=mask.float()), Text(uncond.float(), mask=uncond_mask.float())
    if kind == "flux":
        texts = [pipeline.encode_prompt(p, p, max_sequence_length=LONG_TOKENS)[:2] for p in (PROMPTS, [NEGATIVE] * 2)]
        return tuple(Text(tokens.float(), pooled) for tokens, pooled in texts)
    given = pipeline.encode_prompt(PROMPTS, PROMPTS, PROMPTS, negative_prompt=[NEGATIVE] * 2, **options)
    return Text(given[0].float(), given[2]), Text(given[1].float(), given[3])


def default_of(pipeline, name):
    import inspect

    return inspect.signature(type(pipeline).__call__).parameters[name].default


def assert_same_text(found, expected):
    for one, other in zip(found.fields, expected.fields, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            # A text by itself and one of a batch sum in other orders: 1e-6 in CLIP's fp32, a step of bf16 (2^-8) in T5 and Gemma.
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", [*FLOWS, "sd35", "no_t5"])
def test_texts_are_those_of_the_pipeline(folders, kind):
    prior, pipeline = FlowPrior.load(str(folders / kind)), pipeline_of(folders / kind)
    found, (cond, uncond) = prior.embed(PROMPTS, NEGATIVE), pipelines_texts(kind, pipeline)
    assert_same_text(found.cond, cond)
    assert_same_text(found.uncond, uncond)
    assert (cond.tokens[0] - cond.tokens[1]).abs().max() > 0.1  # more than the tolerance
    again = prior.embed(PROMPTS[::-1], NEGATIVE)
    assert all(torch.equal(a, b) for a, b in zip(again.cond[[1, 0]].fields, found.cond.fields, strict=True) if a is not None)


def noise_of(dtype=torch.float32, batch=2):
    return torch.randn(batch, CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def pipelines_samples(kind, pipeline, y, noise, num_steps, guidance_scale):
    """Return what diffusers' pipeline makes of noise in steps of its Euler scheduler that are even before the shift."""
    if kind == "sana":  # its own solver is of second order; the flow is the same
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigmas = torch.linspace(1.0, 0.0, num_steps + 1)[:-1].tolist()
    asked = {"prompt_embeds": y.cond.tokens, "negative_prompt_embeds": y.uncond.tokens, "num_inference_steps": num_steps}
    asked |= {"sigmas": sigmas, "latents": noise, "output_type": "latent", "height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if kind == "sana":
        masks = {"prompt_attention_mask": y.cond.mask, "negative_prompt_attention_mask": y.uncond.mask}
        asked |= masks | {"height": 32, "width": 32, "use_resolution_binning": False, "prompt": None, "negative_prompt": None}
        return pipeline(**asked, guidance_scale=guidance_scale).images
    pooled = {"pooled_prompt_embeds": y.cond.pooled, "negative_pooled_prompt_embeds": y.uncond.pooled}
    if kind == "sd3":
        return pipeline(**asked, **pooled, guidance_scale=guidance_scale).images
    asked["latents"] = pipeline._pack_latents(noise, len(noise), CHANNELS, LATENT_SIZE, LATENT_SIZE)
    tokens = pipeline(**asked, **pooled, guidance_scale=3.5, true_cfg_scale=guidance_scale).images
    return pipeline._unpack_latents(tokens, IMAGE_SIZE, IMAGE_SIZE, pipeline.vae_scale_factor)


@pytest.mark.parametrize("folder", [*FLOWS, "sd35", "no_t5", "schnell"])
def test_steps_with_guidance_are_those_of_the_pipeline(folders, folder):
    kind = {"sd35": "sd3", "no_t5": "sd3", "schnell": "flux"}.get(folder, folder)
    prior, pipeline, noise = FlowPrior.load(str(folders / folder)), pipeline_of(folders / folder), noise_of()
    y = prior.embed(PROMPTS, NEGATIVE)
    expected = pipelines_samples(kind, pipeline, y, noise, 3, 4.0)
    found = sample(prior, y, noise, 3, 4.0)
    # Three steps of fp32; the pipelines' times are rounded to fp32 before they are shifted, and a FLUX's are divided by 1000.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    assert (found - noise).abs().max() > 0.1
