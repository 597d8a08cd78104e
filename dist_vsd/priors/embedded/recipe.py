"""`dist-vsd prior train`: the embedded prior from nothing, resumable, seeded, with a model card of what was measured.

pictures -> VAE -> latents -> UNet and text encoder -> CLIP -> a StableDiffusionPipeline folder -> measurements -> card
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from dist_vsd.priors.embedded import pictures as pictures_module
from dist_vsd.priors.embedded.captions import vocabulary, write_tokenizer
from dist_vsd.priors.embedded.losses import clip_loss, denoising_loss, encode_pictures, vae_loss
from dist_vsd.priors.embedded.networks import (
    build_clip,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    save_pipeline,
)
from dist_vsd.priors.embedded.pictures import Pictures, read_shards, write_shard
from dist_vsd.priors.embedded.recipe_config import NUM_HELD_OUT_SHARDS, FlowRecipeConfig, RecipeConfig
from dist_vsd.priors.embedded.stage import StageSettings, train_stage
from dist_vsd.priors.pipeline_folder import FACTS_FILE
from dist_vsd.serialization import read_tensors, write_tensors

Report = Callable[[str, int, int, dict[str, float]], None]


@dataclasses.dataclass(frozen=True)
class TrainedPrior:
    """The networks of a finished recipe, holding their averaged weights."""

    tokenizer: CLIPTokenizer
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    clip: CLIPModel
    scaling_factor: float


def render_pictures(config: RecipeConfig | FlowRecipeConfig, folder: Path, report: Report) -> None:
    """Render the shards that are missing, in parallel processes."""
    missing = [s for s in range(config.num_shards) if not (folder / f"shard_{s:04d}.safetensors").exists()]
    done = config.num_shards - len(missing)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(config.num_workers, mp_context=context, initializer=_one_thread) as pool:
        for future in concurrent.futures.as_completed([pool.submit(write_shard, folder, config.seed, s) for s in missing]):
            future.result()
            done += 1
            report("pictures", done, config.num_shards, {})


def _one_thread() -> None:
    torch.set_num_threads(1)


def train_prior(config: RecipeConfig, work: Path, device: torch.device, report: Report) -> tuple[TrainedPrior, Pictures]:
    """Run every stage, each from where it was left.

    Args:
        config: lengths and seed.
        work: folder of the pictures and of the stages' states.
        device: to train on.
        report: called with (stage, done, total, figures).

    Returns:
        The networks, on ``device``, and the held-out pictures.
    """
    shown, held_out = make_pictures(config, work, report)

    torch.manual_seed(config.seed)
    vae = build_vae().to(device, memory_format=torch.channels_last)
    settings = StageSettings(name="vae", num_steps=config.vae_steps, learning_rate=2e-3)
    train_stage(settings, {"vae": vae}, vae_loss(vae, shown, 16, device), work, config.seed, device, report)
    vae.requires_grad_(False).eval()
    latents = kept_latents(vae, shown, work / "latents.safetensors", device)
    scaling_factor = 1.0 / float(latents[0, :4096, 0].float().std())

    torch.manual_seed(config.seed + 1)
    tokenizer = build_tokenizer(work / "tokenizer")
    unet = build_unet().to(device, memory_format=torch.channels_last)
    text_encoder = build_text_encoder(tokenizer).to(device)
    alphas_cumprod = build_scheduler().alphas_cumprod.to(device)
    loss = denoising_loss(unet, text_encoder, tokenizer, latents, shown.subjects, scaling_factor, alphas_cumprod, 64, device)
    settings = StageSettings(name="denoiser", num_steps=config.denoiser_steps, learning_rate=1.5e-3, save_every=250)
    train_stage(settings, {"unet": unet, "text_encoder": text_encoder}, loss, work, config.seed, device, report)

    torch.manual_seed(config.seed + 2)
    clip = build_clip(tokenizer).to(device)
    settings = StageSettings(name="clip", num_steps=config.clip_steps, learning_rate=1e-3, save_every=100)
    train_stage(settings, {"clip": clip}, clip_loss(clip, tokenizer, shown, 128, device), work, config.seed, device, report)
    for network in (unet, text_encoder, clip):
        network.requires_grad_(False).eval()
    return TrainedPrior(tokenizer, vae, unet, text_encoder, clip, scaling_factor), held_out


def make_pictures(config: RecipeConfig | FlowRecipeConfig, work: Path, report: Report) -> tuple[Pictures, Pictures]:
    """Render the pictures that are missing in a work folder; return those to train on, and the held-out ones.

    Raises:
        ValueError: the folder was made with another seed or number of shards.
    """
    claim_work_folder(config, work)
    render_pictures(config, work / "pictures", report)
    num_training = config.num_shards - NUM_HELD_OUT_SHARDS
    shards = range(num_training), range(num_training, config.num_shards)
    shown, held_out = (read_shards(work / "pictures", some) for some in shards)
    return shown, held_out


def claim_work_folder(config: RecipeConfig | FlowRecipeConfig, work: Path) -> None:
    """Refuse a work folder whose pictures and states were made with another seed or number of shards."""
    file, mine = work / "recipe.json", {"seed": config.seed, "num_shards": config.num_shards}
    if file.exists():
        theirs = json.loads(file.read_text())
        if theirs != mine:
            raise ValueError(f"--work-dir {work} was made with {theirs}, not {mine}: give those values, or another folder")
    work.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(mine) + "\n")


def kept_latents(vae: AutoencoderKL, shown: Pictures, file: Path, device: torch.device) -> Tensor:
    """Return encode_pictures() of the training pictures, made once; they are read back when a recipe is resumed."""
    if not file.exists():
        write_tensors({"latents": encode_pictures(vae, shown, device)}, file)
    return read_tensors(file)["latents"]


def write_prior(prior: TrainedPrior, folder: Path) -> None:
    """Write a StableDiffusionPipeline folder in fp16 safetensors, the CLIP beside it, and the facts that dist_vsd reads."""
    for tokenizer in (folder / "tokenizer", folder / "clip"):
        write_tokenizer(tokenizer)  # vocab.json and merges.txt, for libraries that do not read tokenizer.json
    prior.vae.register_to_config(scaling_factor=prior.scaling_factor)
    save_pipeline(folder, prior.vae, prior.text_encoder, prior.tokenizer, prior.unet)
    prior.clip.to("cpu", torch.float16).save_pretrained(folder / "clip")
    prior.tokenizer.save_pretrained(folder / "clip")
    moments = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": pictures_module.IMAGE_SIZE}
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(moments, indent=1) + "\n")
    facts = {
        "vocabulary": vocabulary(),
        "camera": {
            "distance": pictures_module.DISTANCE_RANGE,
            "fov_deg": pictures_module.FOV_DEG_RANGE,
            "elevation_deg": pictures_module.ELEVATION_DEG_RANGE,
        },
    }
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n")


class LineReporter:
    """Prints a line a report, with the time that the stage will still take."""

    def __init__(self) -> None:
        self._begin: dict[str, tuple[float, int]] = {}

    def __call__(self, stage: str, done: int, total: int, figures: dict[str, float]) -> None:
        """Print the progress of a stage."""
        now = time.monotonic()
        begin, first = self._begin.setdefault(stage, (now, done))
        left = (now - begin) / (done - first) * (total - done) if done > first else float("nan")
        extra = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        print(f"{stage:<9} {done:>5}/{total}  {extra}  {left / 60:.1f} min left", flush=True)
