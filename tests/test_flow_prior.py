"""Priors that are rectified flows against diffusers' own pipelines, on tiny ones of each kind, and phi on them."""

import inspect
import json

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from peft.tuners.tuners_utils import BaseTunerLayer

from dist_vsd.diffusion.process import add_noise
from dist_vsd.priors import replay
from dist_vsd.priors.flow import FlowPrior
from dist_vsd.priors.flow_config import FlowConfig
from dist_vsd.priors.flow_text import place_for
from dist_vsd.priors.flux import packed, unpacked
from dist_vsd.priors.prior import Text, TextEmbeddings, eps_pretrain, guided_prediction
from dist_vsd.priors.sampling import sample
from dist_vsd.score.lora_score import LoraScore
from dist_vsd.score.score_config import ScoreConfig
from tests.paper_device import DEVICE, OnPaper
from tests.tiny_flows import (
    CHANNELS,
    FLOWS,
    IMAGE_SIZE,
    LATENT_SIZE,
    LONG_TOKENS,
    SCALING_FACTOR,
    SHIFT_FACTOR,
    WIDTH,
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
    absent = [name for name, kind in json.loads((folder / "model_index.json").read_text()).items() if kind == [None, None]]
    pipeline = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent))
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


def test_a_transformer_with_one_clip_reads_its_states_and_nothing_else(folders):
    prior, pipeline = FlowPrior.load(str(folders / "clip")), pipeline_of(folders / "clip")
    y = prior.embed(PROMPTS).cond
    tokens, pooled = pipeline._get_clip_prompt_embeds(PROMPTS)
    assert y.tokens.shape == (2, 16, WIDTH)
    torch.testing.assert_close(y.tokens, tokens, rtol=0, atol=1e-5)  # one text at a time, in fp32
    torch.testing.assert_close(y.pooled, pooled, rtol=0, atol=1e-5)
    noise = noise_of()
    asked = {"encoder_hidden_states": y.tokens, "pooled_projections": y.pooled, "timestep": torch.full((2,), 250.0), "return_dict": False}
    with torch.no_grad():
        assert torch.equal(prior.predict(noise, torch.full((2,), 0.25), y), prior.transformer(noise, **asked)[0])


def noised(prior, dtype=torch.float64):
    y = prior.embed(PROMPTS, NEGATIVE)
    texts = (Text(*(None if rows is None else rows.to(dtype) for rows in text.fields)) for text in (y.cond, y.uncond))
    return noise_of(dtype), torch.tensor([0.1, 0.9]), TextEmbeddings(*texts)


@pytest.mark.parametrize("kind", FLOWS)
def test_eps_is_x_t_and_the_rest_of_the_way_along_v_and_back(exact, kind):
    prior = exact[kind]
    x_t, s, y = noised(prior)
    with torch.no_grad():
        v = prior.predict(x_t, s, y.cond)
        eps = eps_pretrain(prior, x_t, s, y, 1.0)
    share = s.double()[:, None, None, None]
    x_0 = x_t - share * v
    for found, expected in ((eps, x_t + (1 - share) * v), (add_noise(x_0, eps, 1 - share, share), x_t), (eps - x_0, v)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)  # fp64


@pytest.mark.parametrize("guidance_scale", [0.0, 7.5, 100.0])
@pytest.mark.parametrize("kind", FLOWS)
def test_guidance_is_on_the_velocity(exact, kind, guidance_scale):
    x_t, s, y = noised(exact[kind])
    with torch.no_grad():
        v_cond, v_uncond = exact[kind].predict(x_t, s, y.cond), exact[kind].predict(x_t, s, y.uncond)
        found = guided_prediction(exact[kind], x_t, s, y, guidance_scale)
    assert (v_cond - v_uncond).abs().max() > 1e-4
    # fp64: a batch of 4 and one of 2 may sum in another order (1e-15), times a scale of up to 100.
    torch.testing.assert_close(found, v_uncond + guidance_scale * (v_cond - v_uncond), rtol=0, atol=1e-11)


def test_latents_are_the_vaes_means_less_their_shift_times_their_scale_and_back(priors):
    image = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(2))
    for kind, prior in priors.items():
        with torch.no_grad():
            encoded = prior.vae.encode(2 * image - 1)
            z = encoded.latent if kind == "sana" else encoded.latent_dist.mode()
            expected = prior.vae.decode(z).sample
            found = prior.encode(image)
        shift, scale = (0.0, 0.41) if kind == "sana" else (SHIFT_FACTOR, SCALING_FACTOR)
        assert found.shape == (2, *prior.latent_shape) == (2, CHANNELS, LATENT_SIZE, LATENT_SIZE)
        torch.testing.assert_close(found, (z - shift) * scale, rtol=1e-6, atol=1e-6)
        # There and back is z to a rounding of fp32, which the decoder enlarges.
        torch.testing.assert_close(prior.decode(found), (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_renders_of_another_size_are_resized_and_the_gradient_reaches_their_pixels(exact):
    image = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for prior in exact.values():
        given = image.clone().requires_grad_()
        prior.encode(given).square().sum().backward()
        assert (given.grad != 0).all()


def test_latents_are_packed_as_the_pipeline_packs_them_and_unpacked_again():
    x = torch.arange(2 * CHANNELS * 6 * 4.0).reshape(2, CHANNELS, 6, 4)
    assert torch.equal(packed(x), FluxPipeline._pack_latents(x, 2, CHANNELS, 6, 4))
    assert torch.equal(unpacked(packed(x), 6, 4), x)


def test_the_shift_is_the_schedulers_or_the_one_that_is_asked_for(folders, priors):
    for kind, prior in priors.items():
        assert prior.process.shift == pytest.approx(SHIFTS[kind], rel=1e-12)
        assert FlowPrior.load(str(folders / kind), flow=FlowConfig(shift=5.0)).process.shift == 5.0
    # FLUX's grows with the picture: 64 tokens.
    larger = FlowPrior.load(str(folders / "flux"), flow=FlowConfig(image_size=32))
    assert larger.process.shift == pytest.approx(torch.tensor(0.5 + 0.65 * (64 - 256) / 3840).exp().item(), rel=1e-6)
    assert (larger.image_size, larger.latent_shape) == (32, (CHANNELS, 16, 16))


def test_the_size_of_pictures_can_be_chosen(folders):
    """Stable Diffusion 3 takes the middle of its table of places."""
    for kind in FLOWS:
        prior = FlowPrior.load(str(folders / kind), flow=FlowConfig(image_size=8))
        x_0 = prior.encode(torch.rand(1, 3, 16, 16))
        with torch.no_grad():
            v = prior.predict(x_0, torch.tensor([0.5]), prior.embed(["a duck"]).cond)
        assert x_0.shape == v.shape == (1, CHANNELS, 4, 4) == (1, *prior.latent_shape)


def test_the_prior_is_told_the_guidance_embedding_and_phi_none(folders):
    texts, asked = FlowPrior.load(str(folders / "flux")).embed(PROMPTS).cond, (noise_of(), torch.tensor([0.3, 0.8]))
    told = {}
    for scale in (None, 3.5, 1.0):
        prior = FlowPrior.load(str(folders / "flux"), flow=FlowConfig(guidance_embedding=scale))
        with torch.no_grad():
            told[scale] = prior.predict(*asked, texts)
            of_phi = prior.network(*asked, texts)
    assert torch.equal(told[None], told[3.5])
    assert torch.equal(told[1.0], of_phi)
    assert (told[3.5] - told[1.0]).abs().max() > 1e-3
    plain = FlowPrior.load(str(folders / "schnell"))
    assert plain.guidance_embedding is None


def phi_on(prior, **settings):
    return LoraScore(prior.network, ScoreConfig(**settings), torch.Generator().manual_seed(0))


def perturb(score):
    """Move phi away from the zeros at which it starts, as training does."""
    for index, parameter in enumerate(score.phi().values()):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))


# The last block of Stable Diffusion 3 hands no text on: what its text's queries find is read by nobody.
UNREAD = "transformer_blocks.1.attn.add_q_proj"


@pytest.mark.parametrize("targets", [("attention",), ("attention", "feedforward")])
@pytest.mark.parametrize("kind", FLOWS)
def test_phi_begins_as_the_prior_leaves_it_alone_and_is_trained_at_every_projection(folders, kind, targets):
    prior = FlowPrior.load(str(folders / kind), flow=FlowConfig(guidance_embedding=1.0))
    x_t, s, y = noise_of(), torch.tensor([0.3, 0.8]), prior.embed(PROMPTS).cond
    with torch.no_grad():
        alone = prior.network(x_t, s, y)
    score, poses = phi_on(prior, targets=targets), torch.rand(2, 16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert torch.equal(score(x_t, s, y, poses), alone)
        perturb(score)
        asked = score(x_t, s, y, poses)
        assert torch.equal(prior.network(x_t, s, y), alone)
        assert torch.equal(prior.predict(x_t, s, y), alone)
        assert (asked - alone).abs().max() > 1e-2
        assert (score(x_t, s, y, -poses) - asked).abs().max() > 1e-4  # the camera
    score(x_t, s, y, poses).square().sum().backward()
    untrained = [name for name, p in score.phi().items() if p.grad is None or not (p.grad != 0).any()]
    assert [name for name in untrained if kind != "sd3" or UNREAD not in name] == []
    adapted = {name.rpartition("attn")[2] for name, module in prior.network.named_modules() if isinstance(module, BaseTunerLayer)}
    projections = {".to_q", ".to_k", ".to_v"} | ({".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out"} if kind != "sana" else set())
    assert projections <= {name.removeprefix("1").removeprefix("2") for name in adapted}


@pytest.mark.parametrize("kind", FLOWS)
def test_recomputing_activations_changes_no_gradient(folders, kind):
    gradients = []
    for recompute in (False, True):
        prior = FlowPrior.load(str(folders / kind))
        score = phi_on(prior, recompute=recompute)
        perturb(score)
        score(noise_of(), torch.tensor([0.3, 0.8]), prior.embed(PROMPTS).cond, torch.ones(2, 16)).square().sum().backward()
        gradients.append([p.grad for p in score.phi().values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", FLOWS)
def test_replayed_passes_have_the_same_bits_and_follow_phi(folders, kind, monkeypatch):
    monkeypatch.setattr(replay, "ASKED_BEFORE", 0)
    prior = FlowPrior.load(str(folders / kind))
    y, pose = prior.embed(PROMPTS).cond, torch.ones(2, 16)
    score = phi_on(prior)
    with torch.no_grad():
        prior.predict(noise_of(), torch.tensor([0.1, 0.2]), y)  # records
        score(noise_of(), torch.tensor([0.1, 0.2]), y, pose)
        perturb(score)
        asked = (2 * noise_of(), torch.tensor([0.3, 0.8]), y[[1, 0]])
        assert torch.equal(prior.predict(*asked), prior.network(*asked, None, prior.guidance_embedding))
        assert torch.equal(score(*asked, 2 * pose), score._ask(*asked, 2 * pose, None))
    assert prior._predicted._recorded
    assert score._repeated._recorded


def test_phi_may_sit_on_another_checkpoint_that_fits(folders, tmp_path):
    prior = FlowPrior.load(str(folders / "sd3"))
    assert prior.network_of(str(folders / "sd35")).process is prior.process
    with pytest.raises(ValueError, match=r"does not fit the teacher: its kind is FluxPipeline, the teacher's StableDiffusion3Pipeline"):
        prior.network_of(str(folders / "flux"))
    with pytest.raises(ValueError, match=r"does not fit the teacher: its joint_attention_dim is 16, the teacher's 48"):
        prior.network_of(str(folders / "clip"))


def test_a_mix_of_two_texts_shows_the_tokens_of_both():
    one, other = (Text(torch.full((1, 3, 2), value), mask=torch.tensor([mask])) for value, mask in ((0.0, [1.0, 1, 0]), (4.0, [1.0, 0, 0])))
    mixed = one.lerp(other, torch.tensor([0.25]))
    assert torch.equal(mixed.tokens, torch.full((1, 3, 2), 1.0))
    assert torch.equal(mixed.mask, torch.tensor([[1.0, 1, 0]]))
    assert torch.equal(one.lerp(other, torch.tensor([1.0])).mask, other.mask)


@pytest.mark.parametrize("kind", FLOWS)
def test_everything_is_computed_where_the_networks_are(folders, kind):
    """On a device on paper: a tensor in the wrong place raises."""
    with OnPaper(), torch.no_grad():
        prior = FlowPrior.load(str(folders / kind), DEVICE, torch.bfloat16)
        x_0 = prior.encode(torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE).to(DEVICE))
        y = prior.embed(PROMPTS)
        v = guided_prediction(prior, x_0, torch.tensor([0.3, 0.8]).to(DEVICE), y, 7.5)
        assert {tensor.device.type for tensor in (x_0, v, prior.decode(x_0), y.cond.tokens)} == {torch.device(DEVICE).type}
        assert (x_0.dtype, v.dtype) == (torch.float32, torch.float32)


def test_a_text_encoder_that_a_gpu_has_no_room_for_computes_on_the_cpu_and_that_is_said(monkeypatch, capsys):
    """With a card's free memory in the place of a GPU's; T5's 9.5 GB in bf16 beside a transformer of 16."""
    t5, room = 9_524_000_000, {"free": 24 * 10**9 - 16_500_000_000}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (room["free"], 24 * 10**9))
    assert place_for(t5, "cuda") == torch.device("cpu")
    assert capsys.readouterr().err == "a text encoder of 8.9 GiB has no room on the GPU: texts are embedded on the CPU, once\n"
    room["free"] = 20 * 10**9
    assert place_for(t5, "cuda") == torch.device("cuda")
    assert place_for(t5, "cpu") == torch.device("cpu")
    assert capsys.readouterr().err == ""
