"""What the multi-view prior can do, measured on the weights as they ship, and the model card that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras, turntable
from dist_vsd.image_files import tile, write_png
from dist_vsd.priors.attention import use_attention
from dist_vsd.priors.clip import ClipScorer
from dist_vsd.priors.embedded.captions import NORMAL_MAP, all_pairs, caption
from dist_vsd.priors.embedded.card import losses_by_noise_level, write_measurements
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
NUM_COLORS_APART = 5  # of the pairs of object and colour every so many are drawn without attention between the views, too
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

    pairs = all_pairs()
    figures["of_scenes"] = judge_groups(scorer, render_groups(pairs), pairs)
    drawn = {scale: draw_groups(prior, pairs, scale) for scale in (3.0, 7.5)}
    figures["by_guidance"] = {f"{scale:g}": judge_groups(scorer, groups, pairs) for scale, groups in drawn.items()}
    apart = MultiViewPrior.load(str(folder), device)
    use_attention(apart.unet, apart.attention)  # each view by itself
    some = pairs[::NUM_COLORS_APART]
    figures["heights_px_together_and_apart"] = [
        spread_of_heights(groups) for groups in (drawn[7.5][::NUM_COLORS_APART], draw_groups(apart, some, 7.5))
    ]
    rows = [drawn[7.5][pairs.index((name, list(COLORS)[(3 * i) % len(COLORS)]))] for i, name in enumerate(OBJECTS)]
    normals = draw_groups(prior, [(name, "white") for name in OBJECTS], 7.5, NORMAL_MAP)
    write_png(tile([torch.cat(pair) for pair in zip(rows, normals, strict=True)]), folder / "samples.png")
    return figures


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


def judge_groups(scorer: ClipScorer, groups: Tensor, subjects: list[tuple[str, str]]) -> dict[str, Any]:
    """Judge (G, V, 3, H, W) groups on TURN by the embedded CLIP.

    Returns:
        Of objects with a front: right_view, the share of views of whose four view words the camera's fit best; one_front, the share of
        groups in which exactly one view looks like a front. Of all: r_precision, over single views, by_object, and heights_px (see
        spread_of_heights).
    """
    wanted = torch.tensor([VIEW_WORDS.index(words) for words in words_of(TURN)])
    views, recognised = [], []
    for (name, color), pictures in zip(subjects, groups, strict=True):
        pictures = pictures.to(scorer.model.device)
        recognised.append(r_precision(scorer, pictures, [(name, color)] * VIEWS_TOGETHER))
        if name in WITH_A_FRONT:
            texts = scorer.embed_texts([caption(name, color, words) for words in VIEW_WORDS])
            views.append((scorer.embed_images(pictures) @ texts.T).argmax(-1).cpu())
    seen, names = torch.stack(views), [name for name, _ in subjects]
    by_object = {name: [share for other, share in zip(names, recognised, strict=True) if other == name] for name in dict.fromkeys(names)}
    return {
        "right_view": float((seen == wanted).float().mean()),
        "one_front": float(((seen == VIEW_WORDS.index("front view")).sum(1) == 1).float().mean()),
        "r_precision": sum(recognised) / len(recognised),
        "r_precision_by_object": {name: sum(shares) / len(shares) for name, shares in by_object.items()},
        "heights_px": spread_of_heights(groups),
    }


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
    return losses_by_noise_level(prior, x_0, y, generator, cameras.to(prior.device))


def write_card(folder: Path, figures: dict[str, Any], settings: dict[str, Any], note: str) -> None:
    """Write measurements.json and README.md, the model card, beside the weights."""
    machine, size = write_measurements(folder, figures, settings, note)
    of_normals = figures["denoising_loss_of_normal_maps_by_t"]
    losses = "\n".join(f"| {t} | {loss:.4f} | {of_normals[t]:.4f} |" for t, loss in figures["denoising_loss_by_t"].items())
    judged = [("the true scenes", figures["of_scenes"])]
    judged += [(f"samples, guidance {scale}", found) for scale, found in figures["by_guidance"].items()]
    views = "\n".join(
        f"| {name} | {found['right_view']:.3f} | {found['one_front']:.3f} | {found['r_precision']:.3f} | {found['heights_px']:.1f} |"
        for name, found in judged
    )
    least = sorted(figures["by_guidance"]["7.5"]["r_precision_by_object"].items(), key=lambda item: item[1])[:3]
    worst = ", ".join(f"{name} {share:.2f}" for name, share in least)
    together, apart = figures["heights_px_together_and_apart"]
    text = f"""# The embedded prior of four views

The embedded prior, which draws pictures one by one, taught to draw an object from four sides at once: it is told the camera of each view
and attends over all four. {size:.1f} MB of fp16 safetensors in the folders of a StableDiffusionPipeline; its VAE is the embedded prior's.

Made by `dist-vsd prior train --kind multiview` with {json.dumps(settings)} ({machine}). {note}

Words that it knows: those of the embedded prior, and "{NORMAL_MAP}" at the end ("a duck, side view, normal map"): normals along the
camera's axes (right, up, towards the camera), coloured as (n + 1) / 2, on white.

![samples](samples.png)

Rows of four views a quarter turn apart, the front first, and normal maps; {SAMPLER}, {NUM_STEPS} steps, guidance 7.5.

| all {len(all_pairs())} pairs of object and colour | right view | exactly one front | R-precision | heights differ by, px |
|---|---|---|---|---|
{views}

The judge is the embedded CLIP, which is not always right on the true scenes either. View and front are told of the {len(WITH_A_FRONT)}
objects that have one; R-precision, view by view, is the least at guidance 7.5 for {worst}.
Of every fifth pair, heights differ by {together:.1f} px, and without attention between the views by {apart:.1f} px.

| t | denoising loss on held-out groups | of their normal maps |
|---|---|---|
{losses}

Limits: those of the embedded prior. Its VAE has seen no normal maps and makes them pale. Cameras that are not told, all zeros, belong to
the unconditional branch alone.
"""
    (folder / "README.md").write_text(text)
