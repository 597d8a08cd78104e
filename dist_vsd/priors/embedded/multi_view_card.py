"""What the multi-view prior can do, measured on the weights as they ship, and the model card that says so."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras, turntable
from dist_vsd.diffusion.process import add_noise
from dist_vsd.image_files import tile, write_png
from dist_vsd.priors.attention import use_attention
from dist_vsd.priors.clip import ClipScorer
from dist_vsd.priors.embedded.captions import NORMAL_MAP, all_pairs, caption
from dist_vsd.priors.embedded.card import NOISE_LEVELS
from dist_vsd.priors.embedded.pictures import IMAGE_SIZE
from dist_vsd.priors.embedded.recognition import r_precision
from dist_vsd.priors.embedded.render import render_channels
from dist_vsd.priors.embedded.scenes import COLORS, NUM_PROPORTIONS, OBJECTS, WITH_A_FRONT
from dist_vsd.priors.embedded.view_groups import NORMAL_EVERY, ViewGroups, cameras_of
from dist_vsd.priors.multi_view import MultiViewPrior
from dist_vsd.priors.pipeline_folder import EMBEDDED_FOLDER, VIEWS_TOGETHER
from dist_vsd.priors.sampling import sample_images
from dist_vsd.view_words import VIEW_WORDS, view_words

TURN = turntable(VIEWS_TOGETHER, elevation_deg=15.0, distance=2.9, fov_deg=41.0)
NUM_GROUPS = 16  # of objects with a front, in which right views and fronts are counted at each guidance
NUM_STEPS, SAMPLER = 25, "dpmsolver++"
GROUPS_AT_ONCE = 8
# A row is of the object where a pixel of it differs from white by this much.
OBJECT_FROM = 0.15


@torch.no_grad()
def measure(folder: Path, held_out: ViewGroups, device: torch.device) -> dict[str, Any]:
    """Measure the prior in ``folder``, loaded as users load it.

    Args:
        folder: a finished pipeline folder.
        held_out: groups that nothing was trained on.
        device: to measure on.

    Returns:
        Figures by name; the samples go to ``folder``/samples.png.
    """
    prior, scorer = MultiViewPrior.load(str(folder), device), ClipScorer.load(EMBEDDED_FOLDER / "clip", device)
    figures: dict[str, Any] = {"num_held_out_groups": len(held_out)}
    figures["denoising_loss_by_t"] = denoising_loss(prior, held_out, NORMAL_EVERY, None)
    figures["denoising_loss_of_normal_maps_by_t"] = denoising_loss(prior, held_out, NORMAL_EVERY, NORMAL_MAP)

    subjects = _with_a_front(NUM_GROUPS)
    figures["of_scenes"] = judge_groups(scorer, render_groups(subjects), subjects)
    figures["by_guidance"] = {
        f"{scale:g}": judge_groups(scorer, draw_groups(prior, subjects, scale), subjects) for scale in (3.0, 7.5)
    }
    apart = MultiViewPrior.load(str(folder), device)
    use_attention(apart.unet, apart.attention)  # each view by itself
    figures["silhouette_heights_apart_px"] = spread_of_heights(draw_groups(apart, subjects, 7.5))

    pairs = all_pairs()
    drawn = draw_groups(prior, pairs, 7.5)
    right = {name: _r_precision(scorer, drawn, pairs, name) for name in OBJECTS}
    figures["r_precision_cfg_7.5"] = sum(right.values()) / len(right)
    figures["r_precision_cfg_7.5_by_object"] = right
    rows = [drawn[pairs.index((name, list(COLORS)[(3 * i) % len(COLORS)]))] for i, name in enumerate(OBJECTS)]
    normals = draw_groups(prior, [(name, "white") for name in OBJECTS], 7.5, NORMAL_MAP)
    write_png(tile([torch.cat(pair) for pair in zip(rows, normals, strict=True)]), folder / "samples.png")
    return figures


def _r_precision(scorer: ClipScorer, drawn: Tensor, pairs: list[tuple[str, str]], name: str) -> float:
    """Return R-precision of the views of an object, in all colours."""
    chosen = [i for i, pair in enumerate(pairs) if pair[0] == name]
    shown = [pairs[i] for i in chosen for _ in range(VIEWS_TOGETHER)]
    return r_precision(scorer, drawn[chosen].flatten(0, 1).to(scorer.model.device), shown)


def draw_groups(prior: MultiViewPrior, subjects: list[tuple[str, str]], guidance_scale: float, medium: str | None = None) -> Tensor:
    """Draw (G, V, 3, H, W) groups on TURN; captions have the view's words, as prompts of training have."""
    groups = []
    for first in range(0, len(subjects), GROUPS_AT_ONCE):
        chunk = subjects[first : first + GROUPS_AT_ONCE]
        prompts = [caption(name, color, view, medium) for name, color in chunk for view in words_of(TURN)]
        seeds = range(2000 + first, 2000 + first + len(chunk))
        groups.append(sample_images(prior, prompts, NUM_STEPS, guidance_scale, seeds, SAMPLER, TURN).unflatten(0, (-1, VIEWS_TOGETHER)))
    return torch.cat(groups)


def words_of(cameras: Cameras) -> list[str]:
    """Return the view words of cameras."""
    return [view_words(a, e) for a, e in zip(cameras.azimuth_deg.tolist(), cameras.elevation_deg.tolist(), strict=True)]


def render_groups(subjects: list[tuple[str, str]]) -> Tensor:
    """Render (G, V, 3, H, W) true scenes of canonical proportions on TURN, which tell how good the judge is."""
    still = torch.zeros(VIEWS_TOGETHER, NUM_PROPORTIONS)
    return torch.stack([render_channels(name, [color] * VIEWS_TOGETHER, still, TURN, IMAGE_SIZE)[0] for name, color in subjects])


def judge_groups(scorer: ClipScorer, groups: Tensor, subjects: list[tuple[str, str]]) -> dict[str, float]:
    """Judge (G, V, 3, H, W) groups of objects with a front on TURN by the embedded CLIP.

    Returns:
        right_view, the share of views of whose four view words the camera's fit best; one_front, the number of groups in which exactly
        one view looks like a front; heights_px, see spread_of_heights.
    """
    wanted = torch.tensor([VIEW_WORDS.index(words) for words in words_of(TURN)])
    found = []
    for (name, color), views in zip(subjects, groups, strict=True):
        texts = scorer.embed_texts([caption(name, color, words) for words in VIEW_WORDS])
        found.append((scorer.embed_images(views.to(texts.device)) @ texts.T).argmax(-1).cpu())
    view = torch.stack(found)
    one_front = ((view == VIEW_WORDS.index("front view")).sum(1) == 1).sum()
    return {"right_view": float((view == wanted).float().mean()), "one_front": int(one_front), "heights_px": spread_of_heights(groups)}


def spread_of_heights(groups: Tensor) -> float:
    """Return how much the heights of the silhouettes of a group differ, highest less lowest, pixels, mean over (G, V, 3, H, W) groups.

    Views of one object on one turn are of nearly one height: perspective leaves a little (see of_scenes).
    """
    is_object = ((1 - groups).amax(2) > OBJECT_FROM).any(-1)
    heights = is_object.sum(-1).float()
    return float((heights.amax(1) - heights.amin(1)).mean())


def denoising_loss(prior: MultiViewPrior, held_out: ViewGroups, every: int, medium: str | None) -> dict[str, float]:
    """Return the mean of ||eps_hat - eps||^2 a number of latents by t, on every n-th held-out group, given whole captions and cameras."""
    generator, chosen = torch.Generator().manual_seed(1), range(0, len(held_out), every)
    stored = held_out.color[::every] if medium is None else held_out.normal[[i // NORMAL_EVERY for i in chosen]]
    x_0 = prior.scaling_factor * stored[:, :, 0].flatten(0, 1).float().to(prior.device)
    cameras = Cameras.cat([cameras_of(held_out.cameras[i : i + 1]) for i in chosen])
    shown = [held_out.subjects[i] for i in chosen for _ in range(VIEWS_TOGETHER)]
    y = prior.embed([caption(*subject, view, medium) for subject, view in zip(shown, words_of(cameras), strict=True)]).cond
    cameras, losses = cameras.to(prior.device), {}
    rows_at_once = 32 * VIEWS_TOGETHER
    for level in NOISE_LEVELS:
        eps = torch.randn(x_0.shape, generator=generator).to(prior.device)
        t = torch.full((len(x_0),), level, device=prior.device)
        x_t = add_noise(x_0, eps, *prior.process.alpha_sigma(t, x_0))
        chunks = [slice(first, first + rows_at_once) for first in range(0, len(x_t), rows_at_once)]
        told = torch.cat([prior.predict(x_t[rows], t[rows], y[rows], cameras[rows]) for rows in chunks])
        losses[str(level)] = float((prior.process.eps(told, x_t, t) - eps).square().mean())
    return losses


def _with_a_front(count: int) -> list[tuple[str, str]]:
    """Return objects with a front in turn, in colours in turn."""
    return [(WITH_A_FRONT[i % len(WITH_A_FRONT)], list(COLORS)[(3 * i + i // len(WITH_A_FRONT)) % len(COLORS)]) for i in range(count)]


def write_card(folder: Path, figures: dict[str, Any], settings: dict[str, Any], note: str) -> None:
    """Write measurements.json and README.md, the model card, beside the weights."""
    machine = f"{platform.machine()}, torch {torch.__version__}"
    record = {"figures": figures, "recipe": settings, "machine": machine, "note": note}
    (folder / "measurements.json").write_text(json.dumps(record, indent=1) + "\n")
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6
    of_normals = figures["denoising_loss_of_normal_maps_by_t"]
    losses = "\n".join(f"| {t} | {loss:.4f} | {of_normals[t]:.4f} |" for t, loss in figures["denoising_loss_by_t"].items())
    judged = [("the true scenes", figures["of_scenes"])]
    judged += [(f"samples, guidance {scale}", found) for scale, found in figures["by_guidance"].items()]
    views = "\n".join(
        f"| {name} | {found['right_view']:.2f} | {found['one_front']} of {NUM_GROUPS} | {found['heights_px']:.1f} |"
        for name, found in judged
    )
    by_object = sorted(figures["r_precision_cfg_7.5_by_object"].items(), key=lambda item: item[1])
    least = f" (the least: {by_object[0][0]}, {by_object[0][1]:.3f})" if by_object[0][1] < 1 else ""
    text = f"""# The embedded prior of four views

The embedded prior, which draws pictures one by one, taught to draw an object from four sides at once: it is told the camera of each view
and attends over all four. {size:.1f} MB of fp16 safetensors in the folders of a StableDiffusionPipeline; its VAE is the embedded prior's.

Made by `dist-vsd prior train --kind multiview` with {json.dumps(settings)} ({machine}). {note}

Words that it knows: those of the embedded prior, and "{NORMAL_MAP}" at the end ("a duck, side view, normal map"): normals along the
camera's axes (right, up, towards the camera), coloured as (n + 1) / 2, on white.

![samples](samples.png)

Rows of four views a quarter turn apart, the front first, and normal maps; {SAMPLER}, {NUM_STEPS} steps, guidance 7.5.

| {NUM_GROUPS} groups of objects with a front, the four sides | right view | exactly one front | heights differ by, px |
|---|---|---|---|
{views}

Heights without attention between the views: {figures["silhouette_heights_apart_px"]:.1f} px. The judge is the embedded CLIP. R-precision of
samples of all {len(all_pairs())} pairs, guidance 7.5, each view by itself: {figures["r_precision_cfg_7.5"]:.3f}{least}.

| t | denoising loss on held-out groups | of their normal maps |
|---|---|---|
{losses}

Limits: those of the embedded prior. Its VAE has seen no normal maps and makes them pale. Cameras that are not told, all zeros, belong to
the unconditional branch alone.
"""
    (folder / "README.md").write_text(text)
