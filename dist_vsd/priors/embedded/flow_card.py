"""What the embedded flow prior can do, measured on the weights as they ship, and the model card that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dist_vsd.image_files import tile, write_png
from dist_vsd.priors.clip import ClipScorer
from dist_vsd.priors.embedded.captions import all_pairs, caption
from dist_vsd.priors.embedded.card import ROWS_AT_ONCE, draw_views, judge_samples, losses_by_noise_level, write_measurements
from dist_vsd.priors.embedded.pictures import Pictures
from dist_vsd.priors.pipeline_folder import EMBEDDED_FOLDER
from dist_vsd.priors.table import load_prior

NOISE_SHARES = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98)  # s
NUM_FOR_LOSSES = 512


@torch.no_grad()
def measure(folder: Path, held_out: Pictures, device: torch.device) -> dict[str, Any]:
    """Measure the prior in ``folder``, loaded as users load it.

    Args:
        folder: a finished pipeline folder.
        held_out: pictures that nothing was trained on.
        device: to measure on.

    Returns:
        Figures by name; the samples go to ``folder``/samples.png.
    """
    prior, scorer = load_prior(str(folder), device), ClipScorer.load(EMBEDDED_FOLDER / "clip", device)
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:NUM_FOR_LOSSES]
    images = held_out.batch(order, torch.zeros(len(order), dtype=torch.bool))
    x_0 = torch.cat([prior.encode(chunk.to(device)) for chunk in images.split(ROWS_AT_ONCE)])
    shown = [held_out.subjects[i] for i in order.tolist()]
    y = prior.embed([caption(s.name, s.color, s.view) for s in shown]).cond
    generator = torch.Generator().manual_seed(1)
    figures: dict[str, Any] = {"num_held_out": len(order)}
    figures["velocity_loss_by_s"] = losses_by_noise_level(prior, x_0, y, generator, levels=NOISE_SHARES)
    figures |= judge_samples(prior, scorer)
    write_png(tile(draw_views(prior)), folder / "samples.png")
    return figures


def write_card(folder: Path, figures: dict[str, Any], settings: dict[str, Any], note: str) -> None:
    """Write measurements.json and README.md, the model card, beside the weights."""
    machine, size = write_measurements(folder, figures, settings, note)
    shift = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["shift"]
    losses = "\n".join(f"| {s} | {loss:.4f} |" for s, loss in figures["velocity_loss_by_s"].items())
    text = f"""# The embedded flow prior

A Stable Diffusion 3 in small: a rectified flow by a transformer whose patches and words attend to one another, of the embedded prior's
objects, colours and views. Its VAE is the embedded prior's; its text encoder began as that one's. {size:.1f} MB of fp16 safetensors; the
folders of a StableDiffusion3Pipeline with one CLIP and no T5.

Made by `dist-vsd prior train --kind flow` with {json.dumps(settings)} ({machine}). {note}

![samples](samples.png)

Euler, 50 steps, shift {shift:g}, guidance 7.5; from above: front, side, back and overhead view.

| measured on the weights as they ship | |
|---|---|
| R-precision of samples, all {len(all_pairs())} pairs, guidance 3 | {figures["r_precision_cfg_3"]:.3f} |
| R-precision, guidance 7.5 | {figures["r_precision_cfg_7.5"]:.3f} |

The judge is the embedded CLIP.

| s | loss of the velocity on {figures["num_held_out"]} held-out pictures |
|---|---|
{losses}

Limits: those of the embedded prior.
"""
    (folder / "README.md").write_text(text)
