"""StableDiffusionPrior against diffusers itself, on tiny pipelines of each architecture, and the embedded prior's words."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from dist_vsd.priors.embedded.captions import MAX_TOKENS
from dist_vsd.priors.pipeline_folder import EMBEDDED_FOLDER, find_pipeline
from dist_vsd.priors.prior import Text, TextEmbeddings, eps_pretrain
from dist_vsd.priors.prompts import check_prompts
from dist_vsd.priors.stable_diffusion import StableDiffusionPrior
from tests.tiny_pipelines import ARCHITECTURES, IMAGE_SIZES, LATENT_SIZE, WIDTH, WIDTH_2, build_pipeline

IMAGE_SIZE = IMAGE_SIZES["sd2_v"]


@pytest.fixture(scope="module", autouse=True)
def no_cache(tmp_path_factory):
    """Embed anew, whatever earlier versions kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIST_VSD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A v-predicting pipeline saved plainly and as its fp16 variant alone, and one of each other architecture saved plainly."""
    folder = tmp_path_factory.mktemp("pipelines")
    for architecture in ARCHITECTURES:
        pipeline = build_pipeline(architecture, folder / f"{architecture}_words")
        pipeline.save_pretrained(folder / architecture)
        if architecture == "sd2_v":
            pipeline.to(torch.float16).save_pretrained(folder / "fp16", variant="fp16")
    return folder


@pytest.fixture(scope="module")
def prior(folders):
    return StableDiffusionPrior.load(str(folders / "sd2_v"))


@pytest.fixture(scope="module")
def exact(folders):
    """The same prior in fp64."""
    return StableDiffusionPrior.load(str(folders / "sd2_v"), dtype=torch.float64)


@pytest.fixture(scope="module")
def embedded():
    return StableDiffusionPrior.load("embedded")


def noised(dtype=torch.float32, batch=3):
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch, 4, LATENT_SIZE, LATENT_SIZE, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(2, batch, MAX_TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return x_t, torch.tensor([20, 500, 980])[:batch], TextEmbeddings(Text(y[0]), Text(y[1]))


def pictures(size, dtype=torch.float32):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def test_both_variants_are_found_frozen_and_hold_the_same_weights(folders, prior):
    half = StableDiffusionPrior.load(str(folders / "fp16"))
    assert half.folder.variants == {"unet": "fp16", "vae": "fp16", "text_encoder": "fp16"}
    assert prior.folder.variants == {"unet": None, "vae": None, "text_encoder": None}
    for one, other in ((prior.unet, half.unet), (prior.vae, half.vae)):
        for parameter, rounded in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(parameter.half().float(), rounded)
            assert rounded.dtype == torch.float32
            assert not rounded.requires_grad
        assert not other.training


def test_images_and_latents_have_the_pipelines_sizes(prior):
    x_0 = prior.encode(pictures(IMAGE_SIZE))
    assert prior.image_size == IMAGE_SIZE
    assert x_0.shape == (2, 4, LATENT_SIZE, LATENT_SIZE)
    image = prior.decode(x_0)
    assert image.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert image.min() == 0
    assert image.max() == 1


def test_encode_is_the_posteriors_scaled_mean_and_decode_undoes_the_scale(prior):
    image = pictures(IMAGE_SIZE)
    with torch.no_grad():
        mean = prior.vae.encode(image * 2 - 1).latent_dist.mode()
        expected = prior.vae.decode(mean).sample
    assert torch.equal(prior.encode(image), mean * prior.vae.config.scaling_factor)
    # x * s / s is x to a rounding of fp32, which the decoder enlarges a little.
    torch.testing.assert_close(prior.decode(prior.encode(image)), (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [40, 10])
def test_renders_of_another_size_are_resized(prior, size):
    plain = torch.tensor([0.2, 0.5, 0.9])[None, :, None, None]
    resized = prior.encode(plain.expand(1, 3, size, size))
    # A plain colour is the same at every size, to the rounding of the filter's weights (1e-7) and of the encoder.
    torch.testing.assert_close(resized, prior.encode(plain.expand(1, 3, IMAGE_SIZE, IMAGE_SIZE)), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_encode_reaches_every_pixel_and_is_its_derivative(exact):
    image = pictures(40, torch.float64).requires_grad_()
    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact.encode(image).square().sum().backward()
    assert (image.grad != 0).all()
    step = 1e-5
    with torch.no_grad():
        ahead, behind = (exact.encode(image + sign * step * direction).square().sum() for sign in (1, -1))
    # Central differences in fp64: the error is of order step^2 = 1e-10, and rounding / step of about 1e-11.
    torch.testing.assert_close((image.grad * direction).sum(), (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-9)


def eps_of(prior, x_t, t, y):
    """Return eps of B texts without guidance."""
    return eps_pretrain(prior, x_t, t, TextEmbeddings(y, None), 1.0)


def test_eps_is_alpha_v_plus_sigma_x_of_the_networks_output(exact):
    x_t, t, y = noised(torch.float64)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_squared = torch.cumprod(1 - betas, 0)[t].reshape(-1, 1, 1, 1)
    with torch.no_grad():
        v = exact.unet(x_t, t, y.cond.tokens).sample
    expected = alpha_squared.sqrt() * v + (1 - alpha_squared).sqrt() * x_t
    # diffusers makes the betas in fp32: alpha_t^2 near 1 is off by some 1e-6 of 1, hence sigma_t at t = 20 by 1e-5.
    torch.testing.assert_close(eps_of(exact, x_t, t, y.cond), expected, rtol=0, atol=1e-4)
    assert (expected - v).abs().max() > 0.1  # the conversion is not nothing


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 7.5, 100.0])
def test_guidance_in_one_batched_call_equals_two_calls(exact, guidance_scale):
    x_t, t, y = noised(torch.float64)
    with torch.no_grad():
        eps_cond, eps_uncond = eps_of(exact, x_t, t, y.cond), eps_of(exact, x_t, t, y.uncond)
    assert (eps_cond - eps_uncond).abs().max() > 1e-4
    expected = (1 - guidance_scale) * eps_uncond + guidance_scale * eps_cond
    # fp64: a batch of 6 and one of 3 may sum in another order (1e-15), times a scale of up to 100.
    torch.testing.assert_close(eps_pretrain(exact, x_t, t, y, guidance_scale), expected, rtol=0, atol=1e-10)


def test_without_guidance_the_network_is_called_once_for_each_row(prior):
    x_t, t, y = noised()
    rows = []
    hook = prior.unet.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    with torch.no_grad():
        for scale in (1.0, 7.5):
            eps_pretrain(prior, x_t, t, y, scale)
    hook.remove()
    assert rows == [3, 6]


def test_results_have_the_precision_of_what_was_given(folders):
    half = StableDiffusionPrior.load(str(folders / "sd2_v"), dtype=torch.bfloat16)
    x_t, t, y = noised()
    with torch.no_grad():
        x_0 = half.encode(pictures(IMAGE_SIZE))
        assert {x_0.dtype, half.decode(x_0).dtype, half.predict(x_t, t, y.cond).dtype} == {torch.float32}
    assert half.unet.dtype == half.vae.dtype == torch.bfloat16


@pytest.mark.parametrize("negative_prompt", ["a cube", ""])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_embeddings_are_those_of_diffusers_own_pipeline(folders, architecture, negative_prompt):
    pipeline = DiffusionPipeline.from_pretrained(folders / architecture, safety_checker=None)
    asked = {"prompt": ["a duck", "a red car, side view"], "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    expected = pipeline.encode_prompt(**asked, device="cpu", negative_prompt=[negative_prompt] * 2 if negative_prompt else None)
    y = StableDiffusionPrior.load(str(folders / architecture)).embed(asked["prompt"], negative_prompt)
    given = [y.cond.tokens, y.uncond.tokens, y.cond.pooled, y.uncond.pooled]
    assert len([part for part in given if part is not None]) == len(expected)
    for part, wanted in zip(given, expected, strict=False):
        # The same encoders on batches of 1 and of 2: fp32 sums in another order.
        torch.testing.assert_close(part, wanted, rtol=1e-5, atol=1e-6)
    assert (y.uncond.tokens == 0).all() == (architecture == "sdxl" and not negative_prompt)
    assert torch.equal(y[[1, 0, 1]].cond.tokens, y.cond.tokens[[1, 0, 1]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_eps_is_what_diffusers_own_pipeline_asks_its_unet(folders, architecture):
    pipeline = DiffusionPipeline.from_pretrained(folders / architecture, safety_checker=None)
    prior = StableDiffusionPrior.load(str(folders / architecture))
    x_t, t, _ = noised()
    y = prior.embed(["a duck", "a red car", "a cube"]).cond
    conditions = {}
    if architecture == "sdxl":
        size = (IMAGE_SIZES["sdxl"],) * 2
        time_ids = pipeline._get_add_time_ids(size, (0, 0), size, torch.float32, text_encoder_projection_dim=WIDTH_2)
        conditions = {"added_cond_kwargs": {"text_embeds": y.pooled, "time_ids": time_ids.repeat(3, 1)}}
    with torch.no_grad():
        prediction = pipeline.unet(x_t, t, encoder_hidden_states=y.tokens, **conditions).sample
        eps = eps_of(prior, x_t, t, y)
    if architecture == "sd2_v":
        alpha_squared = pipeline.scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        prediction = alpha_squared.sqrt() * prediction + (1 - alpha_squared).sqrt() * x_t
    # 1 - alpha_t^2 in fp32 there, in fp64 here.
    torch.testing.assert_close(eps, prediction, rtol=1e-4, atol=1e-5 if architecture == "sd2_v" else 0)


def test_the_pooled_text_and_the_pictures_size_matter_to_an_xl(folders):
    prior = StableDiffusionPrior.load(str(folders / "sdxl"))
    x_t, t, _ = noised()
    y = prior.embed(["a duck", "a red car", "a cube"]).cond
    with torch.no_grad():
        eps, other_text = prior.predict(x_t, t, y), prior.predict(x_t, t, Text(y.tokens, y.pooled.roll(1, 0)))
        sizes = []
        hook = prior.unet.add_time_proj.register_forward_hook(lambda _module, inputs, _output: sizes.append(inputs[0].tolist()))
        prior.predict(x_t[..., :4, :], t, y)
        hook.remove()
    assert (eps - other_text).abs().max() > 1e-4
    assert sizes == [[32.0, 64.0, 0.0, 0.0, 32.0, 64.0] * 3]


def test_in_fp16_the_vae_of_an_xl_alone_stays_in_fp32(folders):
    for architecture, dtype in (("sdxl", torch.float32), ("sd1", torch.float16)):
        prior = StableDiffusionPrior.load(str(folders / architecture), dtype=torch.float16)
        assert (prior.unet.dtype, prior.vae.dtype) == (torch.float16, dtype)
    assert StableDiffusionPrior.load(str(folders / "sdxl"), dtype=torch.bfloat16).vae.dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sizes_are_those_of_the_architecture(folders, architecture):
    prior = StableDiffusionPrior.load(str(folders / architecture))
    size = IMAGE_SIZES[architecture]
    assert (prior.image_size, prior.latent_shape) == (size, (4, LATENT_SIZE, LATENT_SIZE))
    with torch.no_grad():
        assert prior.decode(prior.encode(torch.rand(1, 3, size, size))).shape == (1, 3, size, size)


def test_a_unet_of_another_checkpoint_fits_if_it_shares_latents_texts_and_noise_levels(folders, tmp_path):
    teacher = StableDiffusionPrior.load(str(folders / "sd2"))
    network = teacher.network_of(str(folders / "sd2_v"))
    unet, process = network.unet, network.process
    assert (teacher.process.prediction_type, process.prediction_type) == ("epsilon", "v_prediction")
    assert not torch.equal(unet.conv_in.weight, teacher.unet.conv_in.weight)
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    with pytest.raises(ValueError, match=r"does not fit the teacher: its cross_attention_dim is 40, the teacher's 16; choose one"):
        teacher.network_of(str(folders / "sdxl"))
    other = shutil.copytree(folders / "sd2_v", tmp_path / "other")
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace('"beta_end": 0.012', '"beta_end": 0.02'))
    with pytest.raises(ValueError, match=r"does not fit the teacher: its noise schedule \(alphas_cumprod\) is another"):
        teacher.network_of(str(other))


@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
def test_a_prompt_that_fits_is_taken_and_one_token_more_is_refused_saying_what_would_be_cut(folders, architecture):
    folder = find_pipeline(str(folders / architecture))
    fits = " ".join(["a"] * (MAX_TOKENS - 2))
    check_prompts([fits], folder)
    said = r"a prompt of 15 tokens is too long, the text encoder takes 14: shorten 'a a .* duck', of which 'duck' would be cut off"
    with pytest.raises(ValueError, match=said):
        check_prompts(["a car", f"{fits} duck"], folder)
    with pytest.raises(ValueError, match=said):
        StableDiffusionPrior.load(str(folders / architecture)).embed(["a duck"], f"{fits} duck")


def test_a_prior_without_a_closed_vocabulary_takes_any_words(prior):
    assert prior.embed(["a zeppelin, 8k!"]).cond.tokens.shape == (1, MAX_TOKENS, WIDTH)


@pytest.mark.parametrize(
    ("component", "name"),
    [("unet", "mid_block.resnets.0.conv1.weight"), ("vae", "encoder.conv_in.weight"), ("text_encoder", "final_layer_norm.weight")],
)
def test_weights_that_lack_a_tensor_are_refused_not_drawn_at_random(folders, tmp_path, component, name):
    folder = shutil.copytree(folders / "sd2_v", tmp_path / "prior")
    file = next((folder / component).glob("*.safetensors"))
    tensors = load_file(file)
    del tensors[next(full for full in tensors if full.endswith(name))]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{component}.*{name}"):
        StableDiffusionPrior.load(str(folder)).embed(["a duck"])


def test_the_embedded_prior_takes_both_articles_capitals_and_punctuation(embedded):
    y = embedded.embed(["a orange duck", "an orange duck", "An Orange Duck, side view", "the duck."])
    width = json.loads((EMBEDDED_FOLDER / "text_encoder" / "config.json").read_text())["hidden_size"]
    assert y.cond.tokens.shape == y.uncond.tokens.shape == (4, MAX_TOKENS, width)
    assert y.cond.tokens.isfinite().all()
    assert torch.equal(y.uncond.tokens[0], y.uncond.tokens[3])


def test_the_embedded_prior_reads_prompts_without_regard_to_case(embedded):
    one, other = embedded.embed(["a green duck, side view", "A GREEN Duck,  side view"]).cond.tokens
    # The same tokens in two rows of one batch: at most the order of fp32 sums differs.
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_embedded_prior_names_unknown_words_and_the_nearest_known(embedded):
    with pytest.raises(ValueError, match=r"does not know 'gren', 'zeppelin' \(did you mean green\?\): it knows the words .*duck"):
        embedded.embed(["a gren duck", "a zeppelin, gren"])
