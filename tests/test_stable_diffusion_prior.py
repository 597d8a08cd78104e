"""StableDiffusionPrior against diffusers itself, on a tiny v-predicting pipeline, and the embedded prior's words."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dist_vsd.priors.embedded.captions import MAX_TOKENS, write_tokenizer
from dist_vsd.priors.pipeline_folder import EMBEDDED_FOLDER
from dist_vsd.priors.prior import TextEmbeddings, eps_pretrain
from dist_vsd.priors.stable_diffusion import StableDiffusionPrior

WIDTH, LATENT_SIZE, IMAGE_SIZE = 16, 8, 16


def build_pipeline(folder):
    """Make a random StableDiffusionPipeline of two blocks, 16-pixel images and 8-pixel latents."""
    write_tokenizer(folder / "words")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=WIDTH,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, latent_channels=4, sample_size=IMAGE_SIZE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(5)  # so that some pixels leave [0, 1] and are clamped
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        steps_offset=1, clip_sample=False,
    )  # fmt: skip
    return StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=CLIPTextModel(text_config), tokenizer=tokenizer, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same pipeline saved plainly and as its fp16 variant alone."""
    folder = tmp_path_factory.mktemp("pipelines")
    pipeline = build_pipeline(folder)
    pipeline.save_pretrained(folder / "plain")
    pipeline.to(torch.float16).save_pretrained(folder / "fp16", variant="fp16")
    return folder


@pytest.fixture(scope="module")
def prior(folders):
    return StableDiffusionPrior.load(str(folders / "plain"))


@pytest.fixture(scope="module")
def exact(folders):
    """The same prior in fp64."""
    return StableDiffusionPrior.load(str(folders / "plain"), dtype=torch.float64)


@pytest.fixture(scope="module")
def embedded():
    return StableDiffusionPrior.load("embedded")


def noised(dtype=torch.float32, batch=3):
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch, 4, LATENT_SIZE, LATENT_SIZE, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(2, batch, MAX_TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return x_t, torch.tensor([20, 500, 980])[:batch], TextEmbeddings(y[0], y[1])


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


def test_eps_is_alpha_v_plus_sigma_x_of_the_networks_output(exact):
    x_t, t, y = noised(torch.float64)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_squared = torch.cumprod(1 - betas, 0)[t].reshape(-1, 1, 1, 1)
    with torch.no_grad():
        v = exact.unet(x_t, t, y.cond).sample
    expected = alpha_squared.sqrt() * v + (1 - alpha_squared).sqrt() * x_t
    # diffusers makes the betas in fp32: alpha_t^2 near 1 is off by some 1e-6 of 1, hence sigma_t at t = 20 by 1e-5.
    torch.testing.assert_close(exact.eps(x_t, t, y.cond), expected, rtol=0, atol=1e-4)
    assert (expected - v).abs().max() > 0.1  # the conversion is not nothing


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 7.5, 100.0])
def test_guidance_in_one_batched_call_equals_two_calls(exact, guidance_scale):
    x_t, t, y = noised(torch.float64)
    with torch.no_grad():
        eps_cond, eps_uncond = exact.eps(x_t, t, y.cond), exact.eps(x_t, t, y.uncond)
    assert (eps_cond - eps_uncond).abs().max() > 1e-4
    expected = (1 - guidance_scale) * eps_uncond + guidance_scale * eps_cond
    # fp64: a batch of 6 and one of 3 may sum in another order (1e-15), times a scale of up to 100.
    torch.testing.assert_close(eps_pretrain(exact, x_t, t, y, guidance_scale), expected, rtol=0, atol=1e-10)


def test_without_guidance_the_network_is_called_once_for_each_row_and_no_gradient_flows(prior):
    x_t, t, y = noised()
    rows = []
    hook = prior.unet.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    outputs = [eps_pretrain(prior, x_t.clone().requires_grad_(), t, y, scale) for scale in (1.0, 7.5)]
    hook.remove()
    assert rows == [3, 6]
    assert [output.requires_grad for output in outputs] == [False, False]


def test_results_have_the_precision_of_what_was_given(folders):
    half = StableDiffusionPrior.load(str(folders / "plain"), dtype=torch.bfloat16)
    x_t, t, y = noised()
    with torch.no_grad():
        x_0 = half.encode(pictures(IMAGE_SIZE))
        assert {x_0.dtype, half.decode(x_0).dtype, half.eps(x_t, t, y.cond).dtype} == {torch.float32}
    assert half.unet.dtype == half.vae.dtype == torch.bfloat16


def test_embeddings_are_the_text_encoders_and_repeat_the_negative_prompt(folders, prior):
    pipeline = StableDiffusionPipeline.from_pretrained(folders / "plain", safety_checker=None)
    expected, negative = pipeline.encode_prompt(["a duck", "a car"], "cpu", 1, True, negative_prompt=["a cube"] * 2)
    y = prior.embed(["a duck", "a car"], "a cube")
    # The same encoder on batches of 3 and of 2: fp32 sums in another order.
    torch.testing.assert_close(y.cond, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y.uncond, negative, rtol=1e-5, atol=1e-6)
    assert torch.equal(y[[1, 0, 1]].cond, y.cond[[1, 0, 1]])


def test_a_prior_without_a_closed_vocabulary_takes_any_words(prior):
    assert prior.embed(["a zeppelin, 8k!"]).cond.shape == (1, MAX_TOKENS, WIDTH)


@pytest.mark.parametrize(
    ("component", "name"),
    [("unet", "mid_block.resnets.0.conv1.weight"), ("vae", "encoder.conv_in.weight"), ("text_encoder", "final_layer_norm.weight")],
)
def test_weights_that_lack_a_tensor_are_refused_not_drawn_at_random(folders, tmp_path, component, name):
    folder = shutil.copytree(folders / "plain", tmp_path / "prior")
    file = next((folder / component).glob("*.safetensors"))
    tensors = load_file(file)
    del tensors[next(full for full in tensors if full.endswith(name))]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{component}.*{name}"):
        StableDiffusionPrior.load(str(folder)).embed(["a duck"])


def test_the_embedded_prior_takes_both_articles_capitals_and_punctuation(embedded):
    y = embedded.embed(["a orange duck", "an orange duck", "An Orange Duck, side view", "the duck."])
    width = json.loads((EMBEDDED_FOLDER / "text_encoder" / "config.json").read_text())["hidden_size"]
    assert y.cond.shape == y.uncond.shape == (4, MAX_TOKENS, width)
    assert y.cond.isfinite().all()
    assert torch.equal(y.uncond[0], y.uncond[3])


def test_the_embedded_prior_reads_prompts_without_regard_to_case(embedded):
    one, other = embedded.embed(["a green duck, side view", "A GREEN Duck,  side view"]).cond
    # The same tokens in two rows of one batch: at most the order of fp32 sums differs.
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_embedded_prior_names_unknown_words_and_the_nearest_known(embedded):
    with pytest.raises(ValueError, match=r"does not know 'gren', 'zeppelin' \(did you mean green\?\): it knows the words .*duck"):
        embedded.embed(["a gren duck", "a zeppelin, gren"])
