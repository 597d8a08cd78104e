"""What the embedded prior can do, measured on the weights as they ship, and the model card that says so."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.diffusion.process import add_noise
from dist_vsd.image_files import tile, write_png
from dist_vsd.priors.clip import ClipScorer
from dist_vsd.priors.embedded.captions import all_pairs, caption
from dist_vsd.priors.embedded.pictures import Pictures
from dist_vsd.priors.embedded.recognition import r_precision, recognize
from dist_vsd.priors.embedded.scenes import COLORS, OBJECTS
from dist_vsd.priors.prior import Prior, Text
from dist_vsd.priors.sampling import sample_images
from dist_vsd.priors.stable_diffusion import StableDiffusionPrior

NOISE_LEVELS = (20, 100, 200, 300, 400, 500, 600, 700, 800, 900, 980)
ROWS_AT_ONCE = 128  # a multiple of the views that a prior scores together
VIEWS = ("front view", "side view", "back view", "overhead view")


@torch.no_grad()
def measure(folder: Path, held_out: Pictures, device: torch.device) -> dict[str, Any]:
    """Measure the prior in ``folder``, loaded as users load it.

    Args:
        folder: a finished pipeline folder with its clip/.
        held_out: pictures that nothing was trained on.
        device: to measure on.

    Returns:
        Figures by name; the samples go to ``folder``/samples.png.
    """
    prior = StableDiffusionPrior.load(str(folder), device)
    scorer = ClipScorer.load(folder / "clip", device)
    count = min(len(held_out), 1536)
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:count]
    images = held_out.batch(order, torch.zeros(count, dtype=torch.bool))
    subjects = [held_out.subjects[i] for i in order.tolist()]
    figures: dict[str, Any] = {"num_held_out": count, "vae_psnr_db": _psnr(prior, images, device)}
    figures["denoising_loss_by_t"] = _denoising_loss(prior, images[:512], subjects[:512], device)

    shown = recognize(scorer, images.to(device))
    figures["clip_object_accuracy"] = sum(a == s.name for (a, _), s in zip(shown, subjects, strict=True)) / count
    figures["clip_color_accuracy"] = sum(c == s.color for (_, c), s in zip(shown, subjects, strict=True)) / count

    figures |= judge_samples(prior, scorer)
    write_png(tile(draw_views(prior)), folder / "samples.png")
    return figures


def judge_samples(prior: Prior, scorer: ClipScorer) -> dict[str, float]:
    """Return the R-precision of samples of every pair of object and colour, by guidance scale."""
    pairs, figures = all_pairs(), {}
    for scale in (3.0, 7.5):
        chunks = [pairs[i : i + 32] for i in range(0, len(pairs), 32)]
        drawn = torch.cat([
            sample_images(prior, [caption(*p) for p in chunk], 50, scale, [1000 + 32 * n + i for i in range(len(chunk))])
            for n, chunk in enumerate(chunks)
        ])  # fmt: skip
        figures[f"r_precision_cfg_{scale:g}"] = r_precision(scorer, drawn.to(prior.device), pairs)
    return figures


def draw_views(prior: Prior) -> list[Tensor]:
    """Draw every object from each of VIEWS at guidance 7.5: one (12, 3, H, W) row a view."""
    rows = []
    for view_index, view in enumerate(VIEWS):
        prompts = [caption(name, list(COLORS)[(i + 2 * view_index) % len(COLORS)], view) for i, name in enumerate(OBJECTS)]
        rows.append(sample_images(prior, prompts, 50, 7.5, [7 + view_index] * len(prompts)))
    return rows


def _psnr(prior: StableDiffusionPrior, images: torch.Tensor, device: torch.device) -> float:
    values = []
    for chunk in images.split(128):
        decoded = prior.decode(prior.encode(chunk.to(device))).cpu()
        values.append(-10 * (decoded - chunk).square().mean((1, 2, 3)).log10())
    return float(torch.cat(values).mean())


def _denoising_loss(prior: StableDiffusionPrior, images: torch.Tensor, subjects: list, device: torch.device) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1)
    y = prior.embed([caption(s.name, s.color, s.view) for s in subjects]).cond
    x_0 = torch.cat([prior.encode(chunk.to(device)) for chunk in images.split(ROWS_AT_ONCE)])
    return losses_by_noise_level(prior, x_0, y, generator)


def losses_by_noise_level(
    prior: Prior,
    x_0: Tensor,
    y: Text,
    generator: torch.Generator,
    cameras: Cameras | None = None,
    levels: Sequence[float] = NOISE_LEVELS,
) -> dict[str, float]:
    """Return the mean of ||eps_hat - eps||^2 a number of latents, of a flow that of ||v_hat - v||^2, by t.

    Args:
        prior: to be measured.
        x_0: (B, ...) latents, on its device.
        y: B captions, embedded.
        generator: draws eps, on the CPU.
        cameras: B, on its device, for a prior that knows cameras.
        levels: of t, in the numbers of its process.
    """
    losses = {}
    for level in levels:
        eps = torch.randn(x_0.shape, generator=generator).to(x_0.device)
        t = torch.full((len(x_0),), level, device=x_0.device)
        x_t = add_noise(x_0, eps, *prior.process.alpha_sigma(t, x_0))
        chunks = [slice(first, first + ROWS_AT_ONCE) for first in range(0, len(x_t), ROWS_AT_ONCE)]
        seen_from = [None if cameras is None else cameras[rows] for rows in chunks]
        told = [prior.predict(x_t[rows], t[rows], y[rows], seen) for rows, seen in zip(chunks, seen_from, strict=True)]
        losses[str(level)] = float(prior.process.error(torch.cat(told), x_0, x_t, eps, t, "").square().mean())
    return losses


def write_measurements(folder: Path, figures: dict[str, Any], settings: dict[str, Any], note: str) -> tuple[str, float]:
    """Write measurements.json; return the machine, in words, and the size of the weights, MB."""
    machine = f"{platform.machine()}, torch {torch.__version__}"
    record = {"figures": figures, "recipe": settings, "machine": machine, "note": note}
    (folder / "measurements.json").write_text(json.dumps(record, indent=1) + "\n")
    return machine, sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6


def write_card(folder: Path, figures: dict[str, Any], settings: dict[str, Any], note: str) -> None:
    """Write measurements.json and README.md, the model card, beside the weights."""
    machine, size = write_measurements(folder, figures, settings, note)
    losses = "\n".join(f"| {t} | {loss:.4f} |" for t, loss in figures["denoising_loss_by_t"].items())
    text = f"""# The embedded prior

A Stable Diffusion in small: 64x64 pictures of {len(OBJECTS)} objects in {len(COLORS)} colours from any side, and a small CLIP
trained on the same pictures. {size:.1f} MB of fp16 safetensors; a complete StableDiffusionPipeline folder.

Made by `dist-vsd prior train` with {json.dumps(settings)} ({machine}). {note}

Words that it knows: objects {", ".join(OBJECTS)}; colours {", ".join(COLORS)}; the view words front, side, back, overhead view.

![samples](samples.png)

DDIM, 50 steps, guidance 7.5; from above: front, side, back and overhead view.

| measured on the weights as they ship | |
|---|---|
| VAE, PSNR on {figures["num_held_out"]} held-out pictures | {figures["vae_psnr_db"]:.1f} dB |
| R-precision of DDIM samples, all {len(OBJECTS) * len(COLORS)} pairs, guidance 3 | {figures["r_precision_cfg_3"]:.3f} |
| R-precision, guidance 7.5 | {figures["r_precision_cfg_7.5"]:.3f} |
| CLIP, object right on held-out pictures | {figures["clip_object_accuracy"]:.4f} |
| CLIP, colour right on held-out pictures | {figures["clip_color_accuracy"]:.4f} |

| t | denoising loss on held-out pictures |
|---|---|
{losses}

Limits: plain objects on white; side views do not say left or right; from straight above some objects look alike. It knows
nothing else, and is meant for tests, demonstrations and research on score distillation itself.
"""
    (folder / "README.md").write_text(text)
