"""How far the VSD gradient in bf16 and fp16 is from fp32, by t: on the embedded prior, and at random weights of SD 2.1's architecture.

    python benchmarks/precision.py                                     both, about 15 minutes on a core
    python benchmarks/precision.py --only embedded --out /tmp/precision        a look at whether it works

What is compared is eps_pretrain - eps_phi with guidance 7.5, the gradient with respect to x_0 without its weight, at one x_t. "Rounded"
precisions compute in fp32 and round what each operation of torch gives, as a GPU does, which adds up in fp32 and stores in half: a CPU
has no fast fp16. bf16 as this CPU computes it stands beside them. Whether the error averages out is told by the mean over many draws of
the noise. Results go to benchmarks/results/precision.json and docs/precision.png.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from dist_vsd.cameras import look_at_origin
from dist_vsd.diffusion.guidance import classifier_free_guidance
from dist_vsd.diffusion.process import add_noise
from dist_vsd.priors.architectures import RandomPrior
from dist_vsd.priors.embedded.render import render_object
from dist_vsd.priors.embedded.scenes import NUM_PROPORTIONS
from dist_vsd.priors.prior import Prior, Text, TextEmbeddings
from dist_vsd.priors.table import load_prior
from dist_vsd.scaling.machine import Places, commit_of_package, describe_machine
from dist_vsd.score.camera_embedding import pose_of
from dist_vsd.score.lora_score import LoraScore
from dist_vsd.score.score_config import ScoreConfig

ROOT = Path(__file__).parent.parent
GUIDANCE = 7.5
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PHI_STEPS, PHI_LR = 60, 1e-3
NUM_DRAWS = 256  # of the noise, of one picture, for the mean


@dataclasses.dataclass(frozen=True)
class Question:
    """What prior and phi are asked about: B samples.

    Attributes:
        x_0: (B, ...) encoded.
        y: their texts.
        pose: (B, P).
        times: at which they are noised.
    """

    x_0: Tensor
    y: TextEmbeddings
    pose: Tensor
    times: tuple[int, ...]


class Rounded(TorchDispatchMode):
    """Rounds what each operation gives to a dtype, and keeps computing in fp32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(out.alias_info is not None for out in func._schema.returns):  # a view, or in place
            return result
        return tree_map(lambda one: self._round(one) if isinstance(one, Tensor) and one.dtype == torch.float32 else one, result)

    def _round(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype).float()


@contextlib.contextmanager
def rounded(unet: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Round inside a UNet, its weights too, but not in the sines of t, which are made in fp32 at any precision."""
    if dtype is None:
        yield
        return
    forward, sines, weights = unet.forward, unet.time_proj.forward, [p.detach().clone() for p in unet.parameters()]

    def rounded_forward(*args: Any, **kwargs: Any) -> Any:
        with Rounded(dtype):
            return forward(*args, **kwargs)

    def exact_sines(t: Tensor) -> Tensor:
        with _disable_current_modes():
            return sines(t)

    unet.forward, unet.time_proj.forward = rounded_forward, exact_sines
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(dtype).float()
    try:
        yield
    finally:
        del unet.forward, unet.time_proj.forward
        for parameter, weight in zip(unet.parameters(), weights, strict=True):
            parameter.data = weight


@torch.no_grad()
def predictions(prior: Prior, score: LoraScore, asked: Question, t: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return eps_uncond, eps_cond and eps_phi at a time and a draw of noise, in fp32."""
    times = torch.full((len(asked.x_0),), t)
    eps = torch.randn(asked.x_0.shape, generator=torch.Generator().manual_seed(seed))
    x_t = add_noise(asked.x_0, eps, *prior.process.alpha_sigma(times, asked.x_0))
    both = prior.predict(torch.cat([x_t, x_t]), times.repeat(2), Text.cat([asked.y.uncond, asked.y.cond]))
    return *both.chunk(2), score(x_t, times, asked.y.cond, asked.pose)


def gradient(uncond: Tensor, cond: Tensor, phi: Tensor) -> Tensor:
    """Return eps_pretrain - eps_phi in the dtype of what is given."""
    return (classifier_free_guidance(uncond, cond, GUIDANCE) - phi).float()


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the error over that of the gradient, the mean over samples."""
    return float(((found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).mean())


def measure(name: str, make: Any, asked: Question, score: LoraScore, prior: Prior, with_native: bool) -> list[dict[str, Any]]:
    """Return a row for each time."""
    exact = {t: predictions(prior, score, asked, t, seed=t) for t in asked.times}
    others = {t: gradient(*predictions(prior, score, asked, t, seed=10_000 + t)) for t in asked.times}
    found: dict[str, dict[int, tuple[Tensor, Tensor, Tensor]]] = {}
    for half, dtype in HALVES.items():
        with rounded(prior.unet, dtype):
            found[f"{half} rounded"] = {t: predictions(prior, score, asked, t, seed=t) for t in asked.times}
        print(f"{name}: {half} done", flush=True)
    if with_native:
        native = make(torch.bfloat16)
        native_score = LoraScore(native.network, ScoreConfig(), torch.Generator().manual_seed(0))
        for parameter, value in zip(native_score.phi().values(), score.phi().values(), strict=True):
            parameter.data = value.data.clone()
        found["bf16 of this CPU"] = {t: predictions(native, native_score, asked, t, seed=t) for t in asked.times}
    rows = []
    for t in asked.times:
        truth, row = gradient(*exact[t]), {"t": t}
        for kind, answers in found.items():
            dtype = HALVES[kind[:4]]
            row[kind] = relative_error(gradient(*answers[t]), truth)
            row[f"{kind}, differences in {kind[:4]}"] = relative_error(gradient(*(one.to(dtype) for one in answers[t])), truth)
            row[f"{kind}, of eps"] = relative_error(answers[t][1], exact[t][1])
        row["another draw of the noise"] = relative_error(others[t], truth)
        row["gradient over eps"] = float((truth.flatten(1).norm(dim=1) / exact[t][1].flatten(1).norm(dim=1)).mean())
        rows.append(row)
        print(name, {key: round(value, 5) for key, value in row.items()}, flush=True)
    return rows


def of_mean(prior: Prior, score: LoraScore, asked: Question) -> list[dict[str, Any]]:
    """Return, for some times, the error of the mean gradient over NUM_DRAWS draws of the noise, of the first sample."""
    rows = [0] * NUM_DRAWS
    one = Question(asked.x_0[rows], asked.y[rows], asked.pose[rows], asked.times[::4])
    found = []
    for t in one.times:
        exact = gradient(*predictions(prior, score, one, t, seed=t))
        row: dict[str, Any] = {"t": t, "draws": NUM_DRAWS}
        for half, dtype in HALVES.items():
            with rounded(prior.unet, dtype):
                error = gradient(*predictions(prior, score, one, t, seed=t)) - exact
            row[f"{half} rounded"] = float(error.mean(0).norm() / exact.mean(0).norm())
            # What is left of errors that know nothing of each other.
            row[f"{half} rounded, if independent"] = float(error.std(0).norm() / NUM_DRAWS**0.5 / exact.mean(0).norm())
        row["another draw of the noise"] = float(exact.std(0).norm() / NUM_DRAWS**0.5 / exact.mean(0).norm())
        found.append(row)
        print("mean", {key: round(value, 5) for key, value in row.items()}, flush=True)
    return found


def of_embedded() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure on the embedded prior, with pictures that it knows and a phi that has learned them; rows of single draws, and of means."""
    prior = load_prior("embedded")
    generator = torch.Generator().manual_seed(0)
    count, colors = 16, ["red", "green"]
    azimuth = torch.linspace(-180.0, 157.5, count)
    cameras = look_at_origin(azimuth, torch.full((count,), 15.0), torch.full((count,), 2.9), torch.full((count,), 41.0))
    shapes = torch.rand(count, NUM_PROPORTIONS, generator=generator) * 2 - 1
    with torch.no_grad():
        x_0 = prior.encode(render_object("duck", [colors[i % 2] for i in range(count)], shapes, cameras, prior.image_size))
    y = prior.embed([f"a {colors[i % 2]} duck" for i in range(count)])
    asked = Question(x_0, y, pose_of(cameras, "c2w"), tuple(range(20, 981, 60)))
    score = LoraScore(prior.network, ScoreConfig(), torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(score.phi().values(), lr=PHI_LR)
    for step in range(PHI_STEPS):
        draws = torch.Generator().manual_seed(step)
        t, eps = torch.randint(1000, (count,), generator=draws), torch.randn(x_0.shape, generator=draws)
        x_t = add_noise(x_0, eps, *prior.process.alpha_sigma(t, x_0))
        (score(x_t, t, y.cond, asked.pose) - eps).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    means = of_mean(prior, score, asked)
    return measure("embedded", lambda dtype: load_prior("embedded", dtype=dtype), asked, score, prior, with_native=True), means


def of_random(latent_size: int) -> list[dict[str, Any]]:
    """Measure at random weights of SD 2.1's architecture, whole in width and depth, on latents of a given size, with a random phi."""
    prior, generator = RandomPrior("sd21"), torch.Generator().manual_seed(0)
    score = LoraScore(prior.network, ScoreConfig(), torch.Generator().manual_seed(0))
    for name, parameter in score.phi().items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02, generator=generator)
    x_0 = torch.randn(1, 4, latent_size, latent_size, generator=generator)
    asked = Question(x_0, prior.embed(["a duck"]), torch.zeros(1, 16), (20, 260, 500, 740, 980))
    return measure("random", lambda dtype: RandomPrior("sd21", dtype=dtype), asked, score, prior, with_native=False)


def plot(record: dict[str, Any], file: Path) -> None:
    """Draw the errors by t, a panel a prior."""
    figure, panels = pyplot.subplots(1, len(record["rows"]), figsize=(5.5 * len(record["rows"]), 4), layout="constrained", squeeze=False)
    titles = {"embedded": "embedded prior", "random": "SD 2.1's architecture, random weights"}
    for axes, (name, rows) in zip(panels[0], record["rows"].items(), strict=True):
        for half, color in (("bf16", "#ee6677"), ("fp16", "#4477aa")):
            t = [row["t"] for row in rows]
            axes.plot(t, [row[f"{half} rounded"] for row in rows], color=color, label=f"{half}, differences in fp32")
            label = f"{half}, differences in {half}"
            axes.plot(t, [row[f"{half} rounded, differences in {half}"] for row in rows], color=color, linestyle="--", label=label)
        axes.plot(t, [row["another draw of the noise"] for row in rows], color="#888888", label="another draw of the noise")
        axes.set_yscale("log")
        axes.set_xlabel("t")
        axes.set_title(titles[name], fontsize=10)
    panels[0][0].set_ylabel("relative error of the VSD gradient")
    panels[0][-1].legend(fontsize=8, loc="center")
    figure.suptitle(f"{record['machine']}, torch {record['torch']}, commit {record['commit']}", fontsize=8)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("embedded", "random"))
    parser.add_argument("--latent-size", type=int, default=32, help="of the random weights' question; Stable Diffusion's own is 64")
    parser.add_argument("--out", type=Path, help="folder for both files instead of benchmarks/results and docs")
    parsed = parser.parse_args()
    commit = commit_of_package()  # of the code that was loaded, whatever is checked out meanwhile
    rows, means = {}, []
    if parsed.only != "random":
        rows["embedded"], means = of_embedded()
    if parsed.only != "embedded":
        rows["random"] = of_random(parsed.latent_size)
    record = {
        "commit": commit,
        "machine": describe_machine(Places.of_this_machine(torch.cuda.device_count())),
        "torch": torch.__version__,
        "guidance_scale": GUIDANCE,
        "latent_size_of_random": parsed.latent_size,
        "rows": rows,
        "of_the_mean": means,
    }
    results, pictures = (parsed.out, parsed.out) if parsed.out else (ROOT / "benchmarks" / "results", ROOT / "docs")
    results.mkdir(parents=True, exist_ok=True)
    (results / "precision.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(record, pictures / "precision.png")


if __name__ == "__main__":
    main()
