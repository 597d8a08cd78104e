"""Rectified flows by every loading path, offline; what is missing, damaged, gated or asked of the wrong kind, refused in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_vsd.cli import main
from dist_vsd.priors.flow import FlowPrior
from dist_vsd.priors.known import GATED, KNOWN_FLOWS
from dist_vsd.priors.pipeline_folder import find_pipeline, is_flow
from dist_vsd.priors.table import load_prior, prior_row
from tests.test_prior_loading import assert_refused, no_network, put_on_hub, rewritten  # noqa: F401 - a fixture
from tests.tiny_flows import CHANNELS, FLOWS, LATENT_SIZE, build_flow, build_sd3, write_facts, write_flow

PATHS = ("fp16", "bf16", "shards", "hub", "hub_pinned")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each kind as <name>/plain, shards, fp16 and bf16; the hub's cache has it as tiny/<name>, and its fp16 variant as revision v1.0."""
    root = tmp_path_factory.mktemp("flows")
    for kind in FLOWS:
        pipeline = build_flow(kind, root / kind / "words")
        plain = write_flow(kind, root / kind / "plain", pipeline)
        pipeline.save_pretrained(root / kind / "shards", max_shard_size="30KB")
        for variant, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            shutil.copytree(plain, root / kind / variant, ignore=shutil.ignore_patterns("*.safetensors"))
            pipeline.to(dtype).save_pretrained(root / kind / variant, variant=variant)
            pipeline = build_flow(kind, root / kind / "words")
        for name in PATHS[:3]:
            shutil.copy(plain / "dist_vsd.json", root / kind / name)
    return root


@pytest.fixture(scope="module")
def hub(folders):
    for kind in FLOWS:
        put_on_hub(folders / kind / "plain", f"tiny/{kind}")
        put_on_hub(folders / kind / "fp16", f"tiny/{kind}", "v1.0")


def name_of(folders, kind, path):
    return {"hub": f"tiny/{kind}", "hub_pinned": f"tiny/{kind}@v1.0"}.get(path, str(folders / kind / path))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", FLOWS)
def test_every_loading_path_gives_the_same_model(folders, hub, kind, path):
    plain, name = FlowPrior.load(str(folders / kind / "plain")), name_of(folders, kind, path)
    assert prior_row(name).is_flow
    prior, variant = load_prior(name), {"hub_pinned": "fp16", "fp16": "fp16", "bf16": "bf16"}.get(path)
    rounded = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(variant, torch.float32)
    assert set(prior.folder.variants.values()) == {variant}
    for component in ("transformer", "vae"):
        expected, found = (getattr(one, component).state_dict() for one in (plain, prior))
        assert expected.keys() == found.keys()
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        # A table of places stays in fp32 in some variants.
        assert [k for k, v in expected.items() if not torch.equal(v.to(rounded).float(), found[k]) and not torch.equal(v, found[k])] == []
    x_t, t = torch.randn(2, CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.9])
    y, expected_y = prior.embed(["a duck", "a car"]).cond, plain.embed(["a duck", "a car"]).cond
    # Weights rounded to bf16 have a relative error of 2^-9. The same ones in fp32, at other places of another file, may be summed by
    # kernels for another alignment.
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if variant else {"rtol": 0, "atol": 2e-6}
    torch.testing.assert_close(y.tokens, expected_y.tokens, **tolerance)
    torch.testing.assert_close(prior.predict(x_t, t, y), plain.predict(x_t, t, expected_y), **tolerance)


def truncate(p):
    file = next((p / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])


def rename_to_bin(p):
    file = next((p / "text_encoder_3").glob("*.safetensors"))
    file.rename(file.with_suffix(".bin"))


def swap(p, one, other):
    shutil.copy(next((p / one).glob("*.safetensors")), p / other / next((p / other).glob("*.safetensors")).name)


def drop_a_shard(p):
    sorted((p / "transformer").glob("*-of-*.safetensors"))[0].unlink()


WITHOUT = "is a transformer without its text encoders"
DAMAGES = {
    "no T5": (lambda p: shutil.rmtree(p / "text_encoder_3"), (WITHOUT, "text_encoder_3 is missing")),
    "no CLIP": (lambda p: shutil.rmtree(p / "text_encoder"), (WITHOUT, "text_encoder is missing")),
    "no CLIP named": (
        lambda p: [rewritten(p / "model_index.json", text_encoder=[None, None]), shutil.rmtree(p / "text_encoder")],
        (WITHOUT, "text_encoder is missing"),
    ),
    "no tokenizer": (lambda p: shutil.rmtree(p / "tokenizer_2"), (WITHOUT, "tokenizer_2 is missing")),
    "no transformer": (lambda p: shutil.rmtree(p / "transformer"), ("is incomplete", "transformer is missing")),
    "no words of T5": (
        lambda p: (p / "tokenizer_3" / "tokenizer.json").unlink(),
        ("is incomplete", "tokenizer_3/tokenizer.json is missing"),
    ),
    "no weights": (lambda p: next((p / "vae").glob("*.safetensors")).unlink(), ("is incomplete", "no diffusion_pytorch_model", "vae")),
    "truncated": (truncate, ("is damaged", "transformer/diffusion_pytorch_model.safetensors can't be read", "copy it anew")),
    "pickled": (rename_to_bin, ("has only pickled weights", "text_encoder_3", "nothing is unpickled")),
    "a broken index": (lambda p: (p / "model_index.json").write_text("{"), ("is damaged", "model_index.json is not readable JSON")),
    "swapped encoders": (lambda p: swap(p, "text_encoder", "text_encoder_2"), ("its text_encoder_2 has wrong weights", "has the shape")),
    "another network": (
        lambda p: swap(p, "vae", "transformer"),
        ("its transformer has wrong weights (pos_embed.proj.weight is not there",),
    ),
    "another class": (
        lambda p: rewritten(p / "model_index.json", vae=["diffusers", "AutoencoderTiny"]),
        ("has a vae of class AutoencoderTiny, not AutoencoderKL",),
    ),
    "another T5": (
        lambda p: rewritten(p / "text_encoder_3" / "config.json", d_model=32),
        ("reads texts of width 48, its text_encoder_3 writes 32",),
    ),
    "another vae": (
        lambda p: rewritten(p / "vae" / "config.json", latent_channels=8),
        ("its transformer takes 4 channels, its vae gives 8",),
    ),
    "another CLIP": (
        lambda p: rewritten(p / "text_encoder" / "config.json", projection_dim=8),
        ("its transformer reads whole texts of width 40, its CLIP text encoders write 32",),
    ),
    "betas": (
        lambda p: rewritten(p / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler"),
        ("has the scheduler DDIMScheduler", "Stable Diffusion 3 is a rectified flow"),
    ),
    "no shift": (
        lambda p: rewritten(p / "scheduler" / "scheduler_config.json", shift=-3.0),
        ("has a shift of -3.0 in its scheduler, it must be a positive number",),
    ),
    "facts": (lambda p: write_facts(p, t5_tokens=-1), ("t5_tokens in dist_vsd.json must be 0 (none) or more, got -1",)),
    "a shard missing": (drop_a_shard, ("is incomplete", "of the", "shards of diffusion_pytorch_model")),
}


@pytest.mark.parametrize(("damage", "fragments"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_folder_that_can_not_be_used_is_refused_before_anything_is_loaded(folders, tmp_path, damage, fragments):
    prior = shutil.copytree(folders / "sd3" / ("shards" if damage is drop_a_shard else "plain"), tmp_path / "prior")
    assert find_pipeline(str(prior)).kind == "StableDiffusion3Pipeline"
    damage(prior)
    assert_refused(str(prior), *fragments)


@pytest.mark.parametrize(("kind", "encoder"), [("flux", "text_encoder"), ("flux", "text_encoder_2"), ("sana", "text_encoder")])
def test_flux_and_sana_can_not_do_without_a_text_encoder(folders, tmp_path, kind, encoder):
    prior = shutil.copytree(folders / kind / "plain", tmp_path / "prior")
    rewritten(prior / "model_index.json", **{encoder: [None, None]})
    assert_refused(str(prior), WITHOUT)


def test_a_tensor_that_the_file_lacks_is_named(folders, tmp_path):
    prior = shutil.copytree(folders / "sd3" / "plain", tmp_path / "prior")
    (file,) = (prior / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors.pop("transformer_blocks.0.attn.to_q.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"its transformer lacks 1 tensor\(s\), transformer_blocks.0.attn.to_q.weight first"):
        FlowPrior.load(str(prior))


def test_known_flows_are_told_by_their_names_and_gated_ones_say_what_to_do():
    for name in KNOWN_FLOWS.values():
        assert is_flow(name)
        with pytest.raises(ValueError, match="prior ") as refused:
            find_pipeline(name)
        assert ("its weights are gated: accept the licence at https://huggingface.co/" in str(refused.value)) == (name in GATED)
        assert "\n" not in str(refused.value)
    assert len(GATED) == 4
    assert not is_flow("stable-diffusion-v1-5/stable-diffusion-v1-5")


def refused(capsys, *words, command=("train", "a red car")):
    """Return the one line with which a command refuses."""
    capsys.readouterr()
    assert main([*command, *words]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1, told
    return told


def test_what_is_asked_of_the_wrong_kind_is_refused_in_one_line_before_anything_is_written(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sd3, sana = (["--prior", str(folders / kind / "plain")] for kind in ("sd3", "sana"))
    image = ["--representation", "image"]
    for words, fragment in (
        ([*sd3, "--flow.shift", "0"], "flow.shift must be a positive number, got 0.0: use 1 for none"),
        ([*sd3, "--flow.shift", "-2"], "flow.shift must be a positive number"),
        ([*sd3, "--flow.guidance-embedding", "3.5"], "is for a transformer that was distilled from guidance"),
        ([*sana, "--flow.guidance-embedding", "3.5"], "is for a transformer that was distilled from guidance"),
        ([*sd3, "--flow.image-size", "18"], "pictures of 18 pixels don't come out even in tokens of 4"),
        ([*sd3, "--flow.image-size", "64"], "pictures of 64 pixels are larger than the 32 that the transformer knows"),
        (["--flow.shift", "3"], "flow.shift is for a prior that is a rectified flow, 'embedded' is none"),
        (["--prior", "random:sd21", "--flow.image-size", "512"], "flow.image_size is for a prior that is a rectified flow"),
        (["--prior", "random:tiny-sd3", "--flow.guidance-embedding", "1"], "distilled from guidance, that of 'random:tiny-sd3' was not"),
        ([*sd3, *image, "--objective", "ancestral", "--ancestral.sampler", "ddim"], "sampler must be euler for this prior"),
        ([*image, "--objective", "ancestral", "--ancestral.sampler", "euler"], "sampler must be ddim or dpmsolver++ for this prior"),
        ([*sd3, *image, "--score.targets", "convolutions"], "this prior's network has no convolutions"),
        ([*sd3, "--score.prior", "embedded"], "does not fit the teacher"),
        (["--score.prior", sd3[1]], "is a rectified flow (Stable Diffusion 3), the teacher is none"),
        ([*sd3, "--attention", "xformers"], "attention must be sdpa for this prior"),
        ([*sd3, "--compile", "regions"], "compile must be off for this prior"),
        (["--preset", "stable-diffusion-3"], f"give one, as in --prior {KNOWN_FLOWS['Stable Diffusion 3 medium']}"),
        (["--prior", "black-forest-labs/FLUX.1-dev"], "its weights are gated"),
    ):
        assert fragment in refused(capsys, *words), words
    for words, fragment in (
        ([*sd3, "--sampler", "ddim"], "sampler must be euler for this prior, which is a rectified flow, got 'ddim'"),
        (["--sampler", "euler"], "sampler must be ddim or dpmsolver++ for this prior"),
        (["--flow.shift", "3"], "is for a prior that is a rectified flow"),
    ):
        assert fragment in refused(capsys, *words, command=("prior", "sample", "a red car")), words
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_is_too_long_for_one_of_the_encoders_is_refused(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    long = ("train", "a red car " * 4)
    # CLIP of the tiny priors takes 14 words, T5 11 and its end, Gemma 11 and its beginning.
    for kind, count in (("sd3", 11), ("flux", 11), ("sana", 11)):
        told = refused(capsys, "--prior", str(folders / kind / "plain"), "--representation", "image", command=long)
        assert f"a prompt of 12 tokens is too long, the text encoder takes {count}: shorten" in told
    assert json.loads((folders / "sd3" / "plain" / "dist_vsd.json").read_text())["t5_tokens"] == 12


def test_an_encoder_whose_tokens_nobody_reads_is_not_loaded(tmp_path):
    """t5_tokens 0, and T5 in the folder all the same: CLIP's tokens alone."""
    folder = write_flow("sd3", tmp_path / "prior", build_sd3(tmp_path / "parts"), t5_tokens=0)
    y = FlowPrior.load(str(folder)).embed(["a duck"]).cond
    assert y.tokens.shape == (1, 16, 48)
    assert (y.tokens[..., 40:] == 0).all()
