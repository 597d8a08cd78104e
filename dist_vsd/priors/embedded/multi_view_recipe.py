"""`dist-vsd prior train --kind multiview`: the embedded prior taught four views of an object together, and normal maps, by words.

groups of views -> latents -> the base's UNet, with the camera in its time embedding and self-attention over the views of a group -> a
pipeline folder whose VAE is the base's
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from dist_vsd.priors.attention import use_attention
from dist_vsd.priors.camera_pose import camera_pose
from dist_vsd.priors.embedded.captions import NORMAL_MAP, vocabulary, write_tokenizer
from dist_vsd.priors.embedded.losses import tokenize
from dist_vsd.priors.embedded.networks import build_scheduler, build_tokenizer, save_pipeline
from dist_vsd.priors.embedded.recipe_config import NUM_HELD_OUT_GROUP_SHARDS, MultiViewRecipeConfig
from dist_vsd.priors.embedded.stage import LossFunction, StageSettings, train_stage
from dist_vsd.priors.embedded.view_groups import (
    NORMAL_EVERY,
    ViewGroups,
    cameras_of,
    draw_captions,
    read_shards,
    write_shard,
)
from dist_vsd.priors.pipeline_folder import FACTS_FILE, POSE_WIDTH, VIEWS_TOGETHER

Report = Callable[[str, int, int, dict[str, float]], None]

NORMAL_SHARE = 0.15  # of the groups of a batch
# Where a view looks from is decided at high t, where the loss in eps is small: half of the draws are from there, and a sample weighs
# 1 / alpha_t^2, as it would in v, up to MAX_WEIGHT.
HIGH_T_SHARE, HIGH_T_FROM, MAX_WEIGHT = 0.5, 0.6, 10.0


@dataclasses.dataclass(frozen=True)
class MultiViewNetworks:
    """What the recipe trains, and what it takes from the base."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL


def make_groups(config: MultiViewRecipeConfig, base: Path, folder: Path, report: Report) -> None:
    """Render and encode the shards that are missing, in parallel processes."""
    missing = [s for s in range(config.num_group_shards) if not (folder / f"groups_{s:04d}.safetensors").exists()]
    done = config.num_group_shards - len(missing)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(config.num_workers, mp_context=context, initializer=_one_thread) as pool:
        for future in concurrent.futures.as_completed([pool.submit(write_shard, folder, config.seed, s, base / "vae") for s in missing]):
            future.result()
            done += 1
            report("groups", done, config.num_group_shards, {})


def _one_thread() -> None:
    torch.set_num_threads(1)


def start_networks(base: Path, folder: Path) -> MultiViewNetworks:
    """Load the base's networks, the UNet with a camera that says nothing yet, the text encoder with the words of normal maps.

    Args:
        base: a pipeline folder of the single-view recipe.
        folder: for the tokenizer.
    """
    tokenizer = build_tokenizer(folder, NORMAL_MAP)
    old_words = json.loads((base / "tokenizer" / "vocab.json").read_text())
    text_encoder = CLIPTextModel.from_pretrained(base / "text_encoder", use_safetensors=True, local_files_only=True).float()
    _widen_vocabulary(text_encoder, old_words, tokenizer)
    pretrained = UNet2DConditionModel.from_pretrained(base / "unet", use_safetensors=True, local_files_only=True).float()
    unet = told_cameras(pretrained)
    use_attention(unet, "sdpa", VIEWS_TOGETHER)
    vae = AutoencoderKL.from_pretrained(base / "vae", use_safetensors=True, local_files_only=True).float()
    return MultiViewNetworks(tokenizer, text_encoder, unet, vae.requires_grad_(False).eval())


def told_cameras(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return the same UNet with a camera's pose beside t, of which it makes nothing yet: the last layer is zero."""
    settings = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    settings |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": POSE_WIDTH}
    told = UNet2DConditionModel(**settings)
    told.load_state_dict(unet.state_dict(), strict=False)
    torch.nn.init.zeros_(told.class_embedding.linear_2.weight)
    torch.nn.init.zeros_(told.class_embedding.linear_2.bias)
    return told


def _widen_vocabulary(text_encoder: CLIPTextModel, old_words: dict[str, int], tokenizer: CLIPTokenizer) -> None:
    """Give a text encoder the rows of a tokenizer that knows more words: those of known ones stay, new ones begin small."""
    new_words = tokenizer.get_vocab()
    old = text_encoder.get_input_embeddings().weight.detach()
    rows = 0.02 * torch.randn(len(new_words), old.shape[1])
    for word, number in new_words.items():
        if word in old_words:
            rows[number] = old[old_words[word]]
    text_encoder.resize_token_embeddings(len(new_words))
    with torch.no_grad():
        text_encoder.get_input_embeddings().weight.copy_(rows)
    config = text_encoder.config
    config.bos_token_id, config.eos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id


def draw_t(count: int, num_timesteps: int, generator: torch.Generator) -> Tensor:
    """Draw (count,) timesteps, HIGH_T_SHARE of them from the highest ones, both parts stratified."""
    u = (torch.rand(1, generator=generator) + torch.arange(count) / count) % 1
    high = u < HIGH_T_SHARE
    within = torch.where(high, u / HIGH_T_SHARE, (u - HIGH_T_SHARE) / (1 - HIGH_T_SHARE))
    return ((torch.where(high, HIGH_T_FROM + (1 - HIGH_T_FROM) * within, within)) * num_timesteps).long()


def multi_view_loss(networks: MultiViewNetworks, groups: ViewGroups, batch: int, device: torch.device) -> LossFunction:
    """DDPM's loss (Ho et al. 2020, eq. 14) on groups of views that share t and are denoised together (MVDream, Shi et al. 2023, eq. 1).

    Args:
        networks: on ``device``.
        groups: to draw from.
        batch: groups a step.
        device: of the networks.
    """
    alphas_cumprod = build_scheduler().alphas_cumprod.to(device)
    scaling_factor = networks.vae.config.scaling_factor

    def loss(step: int, generator: torch.Generator) -> Tensor:
        indices = torch.randint(len(groups), (batch,), generator=generator)
        is_normal = torch.rand(batch, generator=generator) < NORMAL_SHARE
        indices = torch.where(is_normal, indices // NORMAL_EVERY * NORMAL_EVERY, indices)
        latents = torch.where(is_normal[:, None, None, None, None, None], groups.normal[indices // NORMAL_EVERY], groups.color[indices])
        mean, std = latents.flatten(0, 1).float().to(device).unbind(1)
        x_0 = scaling_factor * (mean + std * torch.randn(mean.shape, generator=generator).to(device))
        captions, poses = [], []
        for index, normal in zip(indices.tolist(), is_normal.tolist(), strict=True):
            cameras = cameras_of(groups.cameras[index : index + 1])
            words, without_camera = draw_captions(groups.subjects[index], cameras, NORMAL_MAP if normal else None, generator)
            captions += words
            poses.append(camera_pose(cameras.dropped() if without_camera else cameras))
        t = draw_t(batch, len(alphas_cumprod), generator).repeat_interleave(VIEWS_TOGETHER).to(device)
        eps = torch.randn(x_0.shape, generator=generator).to(device)
        alpha_t, sigma_t = (value[:, None, None, None] for value in (alphas_cumprod[t].sqrt(), (1 - alphas_cumprod[t]).sqrt()))
        x_t = (alpha_t * x_0 + sigma_t * eps).to(memory_format=torch.channels_last)
        y = networks.text_encoder(tokenize(networks.tokenizer, captions).to(device))[0]
        predicted = networks.unet(x_t, t, y, class_labels=torch.cat(poses).to(device)).sample
        weight = alpha_t.pow(-2).clamp_max(MAX_WEIGHT)
        return (weight * (predicted - eps).square()).mean()

    return loss


def train_multi_view(
    config: MultiViewRecipeConfig, base: Path, work: Path, device: torch.device, report: Report
) -> tuple[MultiViewNetworks, ViewGroups]:
    """Run every stage, each from where it was left.

    Args:
        config: lengths and seed.
        base: a pipeline folder of the single-view recipe.
        work: folder of the groups and of the stage's state.
        device: to train on.
        report: called with (stage, done, total, figures).

    Returns:
        The networks, on ``device``, and the held-out groups.
    """
    make_groups(config, base, work / "groups", report)
    num_training = config.num_group_shards - NUM_HELD_OUT_GROUP_SHARDS
    shown = read_shards(work / "groups", range(num_training))
    held_out = read_shards(work / "groups", range(num_training, config.num_group_shards))
    torch.manual_seed(config.seed + 3)
    networks = start_networks(base, work / "tokenizer")
    unet, text_encoder = networks.unet.to(device, memory_format=torch.channels_last), networks.text_encoder.to(device)
    settings = StageSettings(name="multiview", num_steps=config.steps, learning_rate=config.learning_rate, save_every=100)
    loss = multi_view_loss(networks, shown, config.batch, device)
    train_stage(settings, {"unet": unet, "text_encoder": text_encoder}, loss, work, config.seed, device, report)
    for network in (unet, text_encoder):
        network.requires_grad_(False).eval()
    return networks, held_out


def write_multi_view(networks: MultiViewNetworks, base: Path, folder: Path) -> None:
    """Write a pipeline folder in fp16 safetensors, its VAE the base's, and the facts that dist_vsd reads.

    Args:
        networks: trained.
        base: the folder that they were made from.
        folder: to write.
    """
    write_tokenizer(folder / "tokenizer", NORMAL_MAP)
    save_pipeline(folder, networks.vae, networks.text_encoder, networks.tokenizer, networks.unet)
    shutil.copytree(base / "vae", folder / "vae", dirs_exist_ok=True)  # as it is: diffusers writes where it was loaded from beside it
    facts = json.loads((base / FACTS_FILE).read_text()) | {"vocabulary": vocabulary(NORMAL_MAP), "views_per_shot": VIEWS_TOGETHER}
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n")
