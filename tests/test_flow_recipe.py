"""The embedded flow prior: what its recipe draws, where it starts from, its folder, end to end in small; and the weights that ship."""

import json

import pytest
import torch
from diffusers import SD3Transformer2DModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dist_vsd.priors.clip import ClipScorer
from dist_vsd.priors.embedded import flow_networks
from dist_vsd.priors.embedded import pictures as pictures_module
from dist_vsd.priors.embedded.captions import caption, vocabulary
from dist_vsd.priors.embedded.flow_networks import build_transformer, encode_texts, predict_velocity, start_networks
from dist_vsd.priors.embedded.flow_recipe import LOGIT_MEAN, LOGIT_STD, draw_s, flow_loss, train_flow, write_flow
from dist_vsd.priors.embedded.losses import tokenize
from dist_vsd.priors.embedded.pictures import write_shard
from dist_vsd.priors.embedded.recipe_config import NUM_HELD_OUT_SHARDS, FlowRecipeConfig
from dist_vsd.priors.embedded.recognition import r_precision
from dist_vsd.priors.embedded.scenes import COLORS, OBJECTS
from dist_vsd.priors.pipeline_folder import EMBEDDED_FOLDER, EMBEDDED_FOLDERS, find_pipeline
from dist_vsd.priors.sampling import sample_images
from dist_vsd.priors.table import load_prior
from dist_vsd.serialization import read_tensors

CPU = torch.device("cpu")
SHIPPED = EMBEDDED_FOLDERS["embedded-flow"]
TINY = FlowRecipeConfig(num_shards=NUM_HELD_OUT_SHARDS + 1, steps=3, batch=2, num_workers=1)
FLOOR = 0.9  # of R-precision


class Stopped(Exception):
    """What a test raises where a user would press Ctrl-C."""


def silent(stage, done, total, figures):
    pass


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_logit_of_s_is_normal_and_each_batch_is_spread_over_it():
    batches = torch.stack([draw_s(16, generator(seed)) for seed in range(500)])
    logits = batches.logit()
    # Four standard errors of 8,000 independent draws; stratified ones vary less.
    assert float(logits.mean()) == pytest.approx(LOGIT_MEAN, abs=4 * LOGIT_STD / 8000**0.5)
    assert float(logits.std()) == pytest.approx(LOGIT_STD, abs=4 * LOGIT_STD / 16000**0.5)
    below = (logits < LOGIT_MEAN).sum(1)
    assert ((below >= 7) & (below <= 9)).all()
    assert torch.equal(draw_s(16, generator(3)), draw_s(16, generator(3)))


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    torch.manual_seed(0)
    return start_networks(EMBEDDED_FOLDER, tmp_path_factory.mktemp("tokenizer"))


def test_the_text_encoder_begins_as_the_bases(networks):
    """SD3 reads the states before the last layer, and the pooled text through a projection, here the identity."""
    base = CLIPTextModel.from_pretrained(EMBEDDED_FOLDER / "text_encoder").float()
    tokens = tokenize(networks.tokenizer, ["a green duck, side view", "", "a red car"])
    with torch.no_grad():
        found, (words, pooled) = base(tokens, output_hidden_states=True), encode_texts(networks.text_encoder, tokens)
    assert torch.equal(words, found.hidden_states[-2])
    torch.testing.assert_close(pooled, found.pooler_output, rtol=0, atol=1e-6)


def test_the_velocity_begins_at_zero_and_its_loss_is_what_noise_and_latents_vary_by(networks):
    latents = torch.zeros(2, 12, 2, 4, 16, 16)
    latents[:, :, 0] = 2.0  # means; no spread
    subjects = [pictures_module.Subject(name, "green", 0.0, 0.0) for name in OBJECTS]
    with torch.no_grad():
        loss = flow_loss(networks, latents, subjects, 8, CPU)(0, generator())
    # E|eps - x_0|^2 = 1 + x_0^2; four standard errors of 8 x 1,024 squares of a normal number about x_0.
    x_0 = 2.0 * networks.vae.config.scaling_factor
    assert float(loss) == pytest.approx(1 + x_0**2, abs=4 * ((2 + 4 * x_0**2) / 8192) ** 0.5)


def test_the_velocity_is_learnt_from_the_words_and_from_the_whole_text(networks):
    """After one step from zero, with blocks that begin as the identity, both ways of a text reach the velocity, and s does."""
    torch.manual_seed(1)
    transformer = build_transformer()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x_t, s = torch.randn(1, 4, 16, 16, generator=generator()), torch.tensor([0.7])
    words, pooled = encode_texts(networks.text_encoder, tokenize(networks.tokenizer, ["a duck", "a red car"]))
    with torch.no_grad():
        v = predict_velocity(transformer, x_t, s, words[:1], pooled[:1])
        others = [(s, words[1:], pooled[:1]), (s, words[:1], pooled[1:]), (s / 2, words[:1], pooled[:1])]
        changes = [float((predict_velocity(transformer, x_t, *other) - v).abs().max()) for other in others]
    assert min(changes) > 1e-4


@pytest.fixture(scope="module")
def pictures_folder(tmp_path_factory):
    """Render shards of one picture an object; whole ones take minutes."""
    folder = tmp_path_factory.mktemp("work") / "pictures"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures_module, "SHARD_SIZE", 12)
        for shard in range(TINY.num_shards):
            write_shard(folder, TINY.seed, shard)
    return folder


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(flow_networks, "NUM_LAYERS", 2)


def work_folder(pictures_folder, path):
    path.mkdir()
    (path / "pictures").symlink_to(pictures_folder)
    return path


def stop_before_the_flow(stage, done, total, figures):
    if stage == "flow":
        raise Stopped


def test_the_recipe_resumes_to_the_bit_and_writes_a_folder_that_is_found_and_sampled(pictures_folder, small, tmp_path):
    whole, held_out = train_flow(TINY, EMBEDDED_FOLDER, work_folder(pictures_folder, tmp_path / "whole"), CPU, silent)
    assert len(held_out) == 12 * NUM_HELD_OUT_SHARDS
    stopped = work_folder(pictures_folder, tmp_path / "stopped")
    with pytest.raises(Stopped):
        train_flow(TINY, EMBEDDED_FOLDER, stopped, CPU, stop_before_the_flow)
    assert [file.name for file in stopped.glob("*.safetensors")] == ["flow_latents.safetensors"]
    resumed, _ = train_flow(TINY, EMBEDDED_FOLDER, stopped, CPU, silent)
    again, _ = train_flow(TINY, EMBEDDED_FOLDER, tmp_path / "whole", CPU, silent)
    kept = {name: weight.clone() for name, weight in whole.transformer.state_dict().items()}
    for other in (resumed, again):
        assert [name for name, weight in other.transformer.state_dict().items() if not torch.equal(weight, kept[name])] == []
    assert read_tensors(stopped / "flow.safetensors")["average/transformer.proj_out.weight"].abs().sum() > 0

    write_flow(whole, EMBEDDED_FOLDER, tmp_path / "prior")
    assert [file for file in (tmp_path / "prior").rglob("*.json") if "_name_or_path" in file.read_text()] == []
    found = SD3Transformer2DModel.from_pretrained(tmp_path / "prior" / "transformer", torch_dtype=torch.float16)
    assert all(torch.equal(weight, kept[name].half()) for name, weight in found.state_dict().items())
    folder = find_pipeline(str(tmp_path / "prior"))
    assert folder.facts["vocabulary"] == vocabulary()
    assert folder.config("vae")["shift_factor"] == 0.0  # diffusers' own pipeline adds it
    assert folder.facts["camera"] == find_pipeline("embedded").facts["camera"]
    assert sample_images(load_prior(str(tmp_path / "prior")), ["a green duck"], 2, 7.5, [0]).shape == (1, 3, 64, 64)


def test_the_shipped_weights_draw_what_the_prompt_says():
    """Every object in one colour and each colour on one object or two, by the embedded CLIP: one picture of twelve may be off."""
    pairs = [(name, list(COLORS)[i % len(COLORS)]) for i, name in enumerate(OBJECTS)]
    drawn = sample_images(load_prior("embedded-flow"), [caption(*pair) for pair in pairs], 20, 7.5, range(len(pairs)))
    assert r_precision(ClipScorer.load(), drawn, pairs) >= FLOOR


def test_diffusers_loads_the_shipped_folders_and_draws_the_same_velocity():
    prior = load_prior("embedded-flow")
    transformer = SD3Transformer2DModel.from_pretrained(SHIPPED / "transformer").float()
    encoder = CLIPTextModelWithProjection.from_pretrained(SHIPPED / "text_encoder").float()
    x_t, t = torch.randn(1, *prior.latent_shape, generator=generator()), torch.tensor([0.6])
    with torch.no_grad():
        words, pooled = encode_texts(encoder, tokenize(flow_tokenizer(), ["a green duck"]))
        expected = predict_velocity(transformer, x_t, t, words, pooled)
        found = prior.predict(x_t, t, prior.embed(["a green duck"]).cond)
    # Rounding of fp32 through five blocks; the time is 1000 s on both ways.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def flow_tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer")


def test_the_card_meets_its_floor_and_names_what_was_measured():
    figures = json.loads((SHIPPED / "measurements.json").read_text())["figures"]
    card = (SHIPPED / "README.md").read_text()
    for scale in ("3", "7.5"):
        assert figures[f"r_precision_cfg_{scale}"] >= FLOOR
        assert f"guidance {scale} | {figures[f'r_precision_cfg_{scale}']:.3f} |" in card
    assert (SHIPPED / "samples.png").stat().st_size > 0


def test_what_ships_is_a_transformer_of_six_megabytes_and_the_embedded_priors_vae():
    assert sum(file.stat().st_size for file in (SHIPPED / "transformer").glob("*.safetensors")) <= 6e6
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (SHIPPED / weights).read_bytes() == (EMBEDDED_FOLDER / weights).read_bytes()
    theirs, own = (json.loads((folder / "vae" / "config.json").read_text()) for folder in (EMBEDDED_FOLDER, SHIPPED))
    assert own == theirs | {"shift_factor": 0.0}
