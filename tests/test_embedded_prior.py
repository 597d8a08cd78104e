"""The weights that ship, measured on pictures that no recipe ever rendered: the floors under which they may not fall."""

import json

import pytest
import torch

from dist_vsd.priors.clip import ClipScorer
from dist_vsd.priors.embedded import pictures as pictures_module
from dist_vsd.priors.embedded.captions import caption, vocabulary
from dist_vsd.priors.embedded.pictures import render_shard
from dist_vsd.priors.embedded.recognition import r_precision, recognize
from dist_vsd.priors.embedded.scenes import COLORS, OBJECTS
from dist_vsd.priors.pipeline_folder import EMBEDDED_FOLDER, find_pipeline
from dist_vsd.priors.prior import eps_pretrain
from dist_vsd.priors.sampling import sample_images
from dist_vsd.priors.stable_diffusion import StableDiffusionPrior

FRESH_SEED = 987_654  # the recipe's seeds are small; shard s of seed k is drawn from k * 1,000,003 + s
FLOORS = {"vae_psnr_db": 28.0, "clip_object_accuracy": 0.98, "clip_color_accuracy": 0.98, "r_precision_cfg_7.5": 0.9}


@pytest.fixture(scope="module")
def fresh():
    """Render 300 pictures, 25 of each object."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures_module, "SHARD_SIZE", 300)
        return render_shard(FRESH_SEED, 0)


@pytest.fixture(scope="module")
def images(fresh):
    return fresh.batch(torch.arange(len(fresh)), torch.zeros(len(fresh), dtype=torch.bool))


@pytest.fixture(scope="module")
def prior():
    return StableDiffusionPrior.load("embedded")


@pytest.fixture(scope="module")
def scorer():
    return ClipScorer.load()


def test_the_vae_reconstructs_fresh_pictures_above_its_floor(prior, images):
    with torch.no_grad():
        decoded = torch.cat([prior.decode(prior.encode(chunk)) for chunk in images.split(50)])
    psnr = -10 * (decoded - images).square().mean((1, 2, 3)).log10()
    assert float(psnr.mean()) >= FLOORS["vae_psnr_db"]


def test_clip_recognises_object_and_colour_of_fresh_pictures(scorer, fresh, images):
    shown = recognize(scorer, images)
    wrong = [(s.color, s.name, said) for s, said in zip(fresh.subjects, shown, strict=True) if (s.name, s.color) != said]
    right_object = sum(name == s.name for s, (name, _) in zip(fresh.subjects, shown, strict=True)) / len(fresh)
    right_color = sum(color == s.color for s, (_, color) in zip(fresh.subjects, shown, strict=True)) / len(fresh)
    assert right_object >= FLOORS["clip_object_accuracy"], wrong
    assert right_color >= FLOORS["clip_color_accuracy"], wrong


def test_samples_show_what_the_prompt_says(prior, scorer):
    # A chequerboard of the 12 x 8 pairs: every object in four colours, every colour on six objects.
    pairs = [(n, c) for i, n in enumerate(OBJECTS) for j, c in enumerate(COLORS) if (i + j) % 2 == 0]
    assert len(pairs) == 48
    drawn = sample_images(prior, [caption(*pair) for pair in pairs], 16, 7.5, range(48))
    recognised = recognize(scorer, drawn)
    wrong = [(pair, said) for pair, said in zip(pairs, recognised, strict=True) if pair != said]
    assert r_precision(scorer, drawn, pairs) >= FLOORS["r_precision_cfg_7.5"], wrong


def test_the_prompt_matters_to_the_noise_that_is_predicted(prior, images):
    y = prior.embed(["a green duck", "a red car"])
    with torch.no_grad():
        x_0 = prior.encode(images[:1]).expand(2, -1, -1, -1)
        eps = torch.randn(x_0.shape[1:], generator=torch.Generator().manual_seed(0)).expand_as(x_0)
        t = torch.full((2,), 700)
        alpha_t, sigma_t = prior.process.alpha_sigma(t, x_0)
        predicted = eps_pretrain(prior, alpha_t * x_0 + sigma_t * eps, t, y, 7.5)
    assert float((predicted[0] - predicted[1]).square().mean()) > 1e-3


def test_latents_have_about_unit_variance(prior, images):
    with torch.no_grad():
        x_0 = prior.encode(images[:100])
    # The scaling factor was fitted on other pictures, with the posterior's noise left out.
    assert float(x_0.std()) == pytest.approx(1.0, abs=0.1)


def test_the_cards_figures_meet_the_same_floors():
    figures = json.loads((EMBEDDED_FOLDER / "measurements.json").read_text())["figures"]
    assert {name: figures[name] for name in FLOORS if figures[name] < FLOORS[name]} == {}
    card = (EMBEDDED_FOLDER / "README.md").read_text()
    assert f"{figures['vae_psnr_db']:.1f} dB" in card
    assert f"{figures['r_precision_cfg_7.5']:.3f}" in card


def test_what_ships_is_small_whole_and_knows_its_words():
    assert sum(file.stat().st_size for file in EMBEDDED_FOLDER.rglob("*.safetensors")) <= 12e6
    folder = find_pipeline("embedded")
    assert folder.path == EMBEDDED_FOLDER
    assert folder.facts["vocabulary"] == vocabulary()
    assert not [file for pattern in ("*.bin", "*.pt", "*.pkl", "*.ckpt") for file in EMBEDDED_FOLDER.rglob(pattern)]
    assert (EMBEDDED_FOLDER / "samples.png").stat().st_size > 0
