"""Every architecture by every loading path, offline; and what is missing, damaged or of the wrong kind, refused in one line."""

import json
import os
import shutil
import subprocess
import sys

import huggingface_hub.constants
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from dist_vsd.cli import main
from dist_vsd.priors.hub import is_hub_id
from dist_vsd.priors.networks import load_network
from dist_vsd.priors.pipeline_folder import STABLE_DIFFUSION_XL, find_pipeline
from dist_vsd.priors.single_file import base_model
from dist_vsd.priors.stable_diffusion import StableDiffusionPrior
from tests.runs import environment
from tests.tiny_pipelines import ARCHITECTURES, LATENT_SIZE, build_pipeline, copy_configs, write_ldm

PATHS = ("fp16", "shards", "single_file", "single_file_fp16", "hub", "hub_pinned")
COMMITS = {"main": "a" * 40, "v1.0": "b" * 40}
SD1_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture(scope="module", autouse=True)
def no_network(tmp_path_factory):
    """Keep the hub's client from asking, and give it and the embeddings caches of their own."""
    hub = huggingface_hub.constants
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "HF_HUB_OFFLINE", True)
        patch.setattr(hub, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        patch.setenv("DIST_VSD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each architecture as <name>/plain, fp16, shards, configs, model.safetensors and half.safetensors."""
    root = tmp_path_factory.mktemp("pipelines")
    for architecture in ARCHITECTURES:
        folder = root / architecture
        pipeline = build_pipeline(architecture, folder / "words")
        pipeline.save_pretrained(folder / "plain")
        pipeline.save_pretrained(folder / "shards", max_shard_size="200KB")
        write_ldm(pipeline, architecture, folder / "model.safetensors")
        copy_configs(folder / "plain", folder / "configs")
        pipeline.to(torch.float16).save_pretrained(folder / "fp16", variant="fp16")
        write_ldm(pipeline, architecture, folder / "half.safetensors")
    return root


def put_on_hub(folder, name, revision="main"):
    """Put a folder into the hub's cache as its client would have: files are links to blobs."""
    repository = f"{huggingface_hub.constants.HF_HUB_CACHE}/models--{name.replace('/', '--')}"
    blobs, snapshot = f"{repository}/blobs", f"{repository}/snapshots/{COMMITS[revision]}"
    os.makedirs(f"{repository}/refs", exist_ok=True)
    os.makedirs(blobs, exist_ok=True)
    with open(f"{repository}/refs/{revision}", "w") as ref:
        ref.write(COMMITS[revision])
    for number, file in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        blob, link = f"{blobs}/{revision}-{number:04d}", f"{snapshot}/{file.relative_to(folder)}"
        shutil.copy(file, blob)
        os.makedirs(os.path.dirname(link), exist_ok=True)
        os.symlink(os.path.relpath(blob, os.path.dirname(link)), link)
    return repository


@pytest.fixture(scope="module")
def hub(folders):
    """Each architecture as tiny/<name>, its revision v1.0 being the fp16 variant; and the base of Stable Diffusion 1.x without weights."""
    for architecture in ARCHITECTURES:
        put_on_hub(folders / architecture / "plain", f"tiny/{architecture}")
        put_on_hub(folders / architecture / "fp16", f"tiny/{architecture}", "v1.0")
    put_on_hub(folders / "sd1" / "configs", SD1_BASE)


def name_of(folders, architecture, path):
    folder = folders / architecture
    return {
        "single_file": f"{folder / 'model.safetensors'}+{folder / 'configs'}",
        "single_file_fp16": f"{folder / 'half.safetensors'}+{folder / 'configs'}",
        "single_file_with_its_base": str(folder / "model.safetensors"),
        "hub": f"tiny/{architecture}",
        "hub_pinned": f"tiny/{architecture}@v1.0",
    }.get(path, str(folder / path))


# Tiny files of other architectures have not the widths by which they are told.
EVERY_PATH = [*((architecture, path) for architecture in ARCHITECTURES for path in PATHS), ("sd1", "single_file_with_its_base")]


@pytest.mark.parametrize(("architecture", "path"), EVERY_PATH)
def test_every_loading_path_gives_the_same_model(folders, hub, architecture, path):
    plain = StableDiffusionPrior.load(str(folders / architecture / "plain"))
    prior = StableDiffusionPrior.load(name_of(folders, architecture, path))
    is_half = path in ("fp16", "hub_pinned", "single_file_fp16")
    assert set(prior.folder.variants.values()) == {"fp16" if path in ("fp16", "hub_pinned") else None}
    for component in ("unet", "vae"):
        expected, found = (getattr(one, component).state_dict() for one in (plain, prior))
        assert expected.keys() == found.keys()
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        assert [k for k, v in expected.items() if not torch.equal(v.half().float() if is_half else v, found[k])] == []
    x_t, t = torch.randn(2, 4, LATENT_SIZE, LATENT_SIZE, generator=torch.Generator().manual_seed(0)), torch.tensor([20, 900])
    y, expected_y = prior.embed(["a duck", "a car"]).cond, plain.embed(["a duck", "a car"]).cond
    # Weights rounded to fp16 have a relative error of 2^-11; all others are the same.
    tolerance = {"rtol": 0, "atol": 2e-2} if is_half else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(y.tokens, expected_y.tokens, **tolerance)
    torch.testing.assert_close(prior.predict(x_t, t, y), plain.predict(x_t, t, expected_y), **tolerance)
    shapes = {name: tuple(parameter.shape) for name, parameter in plain.unet.named_parameters()}
    assert sum(map(numel, prior.folder.shapes("unet").values())) == sum(map(numel, shapes.values()))


def numel(shape):
    return torch.Size(shape).numel()


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub):
    for revision, variant in (("", None), ("@main", None), ("@v1.0", "fp16"), (f"@{'a' * 40}", None), (f"@{'b' * 40}", "fp16")):
        assert find_pipeline(f"tiny/sd2{revision}").variants["unet"] == variant
    for revision in ("v2.0", "c" * 40):
        assert_refused(f"tiny/sd2@{revision}", "is neither a folder here nor to be had from the hub", "check the name, the revision")


def test_a_cache_that_another_program_filled_with_one_variant_serves(folders, hub):
    """The hub's client refuses it, as its own listing of the repository has more; everything that we need is there."""
    repository = put_on_hub(folders / "sd1" / "fp16", "tiny/half")
    files = {name: {"size": 1, "blob_id": "0" * 40} for name in ("model_index.json", "unet/diffusion_pytorch_model.safetensors")}
    os.makedirs(f"{repository}/trees")
    with open(f"{repository}/trees/{COMMITS['main']}.json", "w") as listing:
        json.dump({"format_version": 1, "files": files}, listing)
    assert find_pipeline("tiny/half").variants["unet"] == "fp16"


SAMPLE = ["prior", "sample", "a duck", "--num-steps", "2", "--num-samples", "1", "--prior"]
ABSENT = "prior 'tiny/absent' is neither a folder here nor to be had from the hub"


def test_the_command_line_draws_from_the_hubs_cache_alone_if_it_is_told_to_be_offline(hub, tmp_path, monkeypatch, capsys):
    """By the hub's own constants; that they come from the environment is the hub's."""
    monkeypatch.chdir(tmp_path)
    assert main([*SAMPLE, "tiny/sdxl@v1.0"]) == 0
    assert (tmp_path / "sample.png").exists()
    capsys.readouterr()
    assert main([*SAMPLE, "tiny/absent"]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert ABSENT in told


def test_the_command_line_draws_from_the_hubs_cache_if_the_hub_is_down(hub, tmp_path):
    """A process of its own: the hub's address is read when its client is imported."""
    down = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": huggingface_hub.constants.HF_HUB_CACHE}
    run = {"env": environment() | down, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 240}
    done = subprocess.run([sys.executable, "-m", "dist_vsd", *SAMPLE, "tiny/sdxl@v1.0"], **run)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sample.png").exists()
    refused = subprocess.run([sys.executable, "-m", "dist_vsd", *SAMPLE, "tiny/absent"], **run)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1, refused.stderr
    assert ABSENT in refused.stderr


def test_what_can_be_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "prior").mkdir(parents=True)
    names = ("org/name", "org/name@main", "org/na.me-1@refs/pr/3", f"org/name@{'a' * 40}")
    assert all(map(is_hub_id, names))
    paths = ("name", "./org/name", "/org/name", "../name", "a/b/c", "here/prior", "org/.name")
    assert not any(map(is_hub_id, (*paths, f"org/{'a' * 97}", "org/name@", "org/name@../x", "org/name@a/../b")))


def rewritten(file, **changes):
    """Change keys of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def move_weights(source, target):
    shutil.copy(next(source.glob("*.safetensors")), next(target.glob("*.safetensors")))


def drop_a_shard(p):
    sorted((p / "unet").glob("*-of-*.safetensors"))[0].unlink()


def rename_to_bin(p):
    file = next((p / "text_encoder_2").glob("*.safetensors"))
    file.rename(file.with_suffix(".bin"))


def truncate(p):
    file = next((p / "text_encoder_2").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])


FOLDER_CASES = {
    "no tokenizer_2": (lambda p: shutil.rmtree(p / "tokenizer_2"), ("is incomplete", "tokenizer_2 is missing")),
    "no words": (lambda p: [f.unlink() for f in (p / "tokenizer_2").iterdir()], ("is incomplete", "tokenizer_2/vocab.json is missing")),
    "no text_encoder_2": (lambda p: shutil.rmtree(p / "text_encoder_2"), ("is incomplete", "text_encoder_2 is missing")),
    "no weights": (lambda p: next((p / "vae").glob("*.safetensors")).unlink(), ("is incomplete", "no diffusion_pytorch_model", "vae")),
    "truncated": (truncate, ("is damaged", "text_encoder_2/model.safetensors can't be read", "copy it anew")),
    "pickled": (rename_to_bin, ("has only pickled weights", "text_encoder_2", "nothing is unpickled")),
    "a broken index": (lambda p: (p / "model_index.json").write_text("{"), ("is damaged", "model_index.json is not readable JSON")),
    "swapped encoders": (
        lambda p: move_weights(p / "text_encoder", p / "text_encoder_2"),
        ("its text_encoder_2 has wrong weights", "token_embedding.weight has the shape (143, 16)", "says (143, 24)"),
    ),
    "another network": (lambda p: move_weights(p / "vae", p / "unet"), ("its unet has wrong weights", "conv_in.weight")),
    "another class": (
        lambda p: rewritten(p / "model_index.json", vae=["diffusers", "AutoencoderTiny"]),
        ("has a vae of class AutoencoderTiny, not AutoencoderKL",),
    ),
    "no second encoder": (
        lambda p: rewritten(p / "model_index.json", text_encoder=[None, None]),
        ("has a text_encoder of class None, not CLIPTextModel",),
    ),
    "another kind": (
        lambda p: rewritten(p / "model_index.json", _class_name="KolorsPipeline"),
        (
            "is a KolorsPipeline, not a StableDiffusionPipeline or StableDiffusionXLPipeline",
            "choose Stable Diffusion 1.x, 2.x, an XL base model or MVDream",
        ),
    ),
    "the other kind": (
        lambda p: rewritten(p / "model_index.json", _class_name="StableDiffusionPipeline"),
        ("is of mixed parts: its unet reads texts of width 40, its text encoders write 16",),
    ),
    "inpainting": (lambda p: rewritten(p / "unet" / "config.json", in_channels=9), ("its unet takes 9 channels, its vae gives 4",)),
    "no betas": (lambda p: rewritten(p / "scheduler" / "scheduler_config.json", beta_schedule=None), ("has no beta_schedule",)),
    "shifted latents": (lambda p: rewritten(p / "vae" / "config.json", latents_mean=[0.0] * 4), ("shifts its latents",)),
    "oblong": (lambda p: rewritten(p / "unet" / "config.json", sample_size=[8, 16]), ("one sample_size", "got [8, 16]")),
    "another vae": (lambda p: rewritten(p / "vae" / "config.json", block_out_channels=[4, 4, 8]), ("shrinks pictures 4 times, an XL's 8",)),
    "a shard missing": (drop_a_shard, ("is incomplete", "of the", "shards of diffusion_pytorch_model")),
}


@pytest.mark.parametrize(("damage", "fragments"), FOLDER_CASES.values(), ids=FOLDER_CASES.keys())
def test_a_folder_that_can_not_be_used_is_refused_before_anything_is_loaded(folders, tmp_path, damage, fragments):
    prior = shutil.copytree(folders / "sdxl" / ("shards" if damage is drop_a_shard else "plain"), tmp_path / "prior")
    assert find_pipeline(str(prior)).kind == STABLE_DIFFUSION_XL
    damage(prior)
    assert_refused(str(prior), *fragments)


def assert_refused(prior, *fragments):
    with pytest.raises(ValueError, match="^prior ") as refused:
        find_pipeline(prior)
    message = str(refused.value)
    assert "\n" not in message
    assert [fragment for fragment in fragments if fragment not in message] == [], message


def save_without(folders, file, *prefixes):
    tensors = load_file(folders / "sdxl" / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}, file)
    return file


def test_a_single_file_that_can_not_be_used_is_refused_before_anything_is_loaded(folders, hub, tmp_path):
    xl, configs = folders / "sdxl" / "model.safetensors", folders / "sdxl" / "configs"
    (tmp_path / "short.safetensors").write_bytes(xl.read_bytes()[:-100])
    assert_refused(f"{tmp_path / 'short.safetensors'}+{configs}", "is damaged", "short.safetensors can't be read")
    part = folders / "sdxl/plain/unet/diffusion_pytorch_model.safetensors"
    for file in (save_without(folders, tmp_path / "lora.safetensors", "first_stage", "cond"), part):
        assert_refused(f"{file}+{configs}", "is not a whole model in the original layout")
    file = save_without(folders, tmp_path / "one.safetensors", "conditioner.embedders.1")
    assert_refused(f"{file}+{configs}", "its text_encoder_2 has wrong weights (token_embedding.weight is not there")
    assert_refused(f"{folders / 'sd1' / 'model.safetensors'}+{configs}", "its vae has wrong weights")
    assert_refused(f"{xl}+{folders / 'sd1' / 'configs'}", "has wrong weights")
    assert_refused(f"{xl}+{tmp_path / 'absent'}", f"'{tmp_path / 'absent'}' is not a folder")
    assert_refused(f"{xl}+tiny/absent", "neither a folder here nor to be had from the hub")
    assert find_pipeline(f"{xl}+tiny/sdxl@v1.0").single_file == xl
    assert_refused(f"{tmp_path / 'absent.safetensors'}+{configs}", "is not a folder here, nor a file")
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04.")
    assert_refused(str(tmp_path / "model.ckpt"), "is pickled: nothing is unpickled here, convert it to safetensors")


def test_a_single_file_that_lacks_a_tensor_or_says_that_it_predicts_v_is_refused(folders, tmp_path):
    tensors, configs = load_file(folders / "sd1" / "model.safetensors"), folders / "sd1" / "configs"
    file = tmp_path / "model.safetensors"
    name = "model.diffusion_model.middle_block.1.proj_in.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, file)
    with pytest.raises(ValueError, match=r"its unet lacks 1 tensor\(s\), mid_block.attentions.0.proj_in.weight first"):
        load_network(UNet2DConditionModel, find_pipeline(f"{file}+{configs}"), "unet", torch.float32)
    save_file(tensors | {"v_pred": torch.zeros(0)}, file)
    assert_refused(f"{file}+{configs}", "says that it predicts v", "has prediction_type 'epsilon'")


def test_the_base_of_a_single_file_is_told_by_its_tensors_unless_they_do_not_say_enough(folders, monkeypatch, tmp_path):
    xl = {"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,)}
    assert base_model(xl, "x") == "stabilityai/stable-diffusion-xl-base-1.0"
    assert base_model({"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "x") == SD1_BASE
    two = {"model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024)}
    with pytest.raises(ValueError, match=r"does not say whether it predicts eps or v: name a pipeline folder that does, .*\+FOLDER"):
        base_model(two, "x")
    with pytest.raises(ValueError, match="is of the kind inpainting: choose"):
        base_model({"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}, "x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert_refused(str(folders / "sd1" / "model.safetensors"), f"needs the configurations and the tokenizer of {SD1_BASE}", "+FOLDER")
