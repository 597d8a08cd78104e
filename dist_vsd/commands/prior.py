"""`dist-vsd prior sample | train`: draw from any prior; train the embedded one."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Annotated, Any

import tyro

from dist_vsd.commands.arguments import nearest_command, parse
from dist_vsd.priors.embedded.recipe_config import FlowRecipeConfig, MultiViewRecipeConfig, RecipeConfig
from dist_vsd.priors.flow_config import FlowConfig
from dist_vsd.priors.pipeline_folder import PipelineFolder, find_pipeline
from dist_vsd.priors.pipeline_kinds import FLOWS
from dist_vsd.priors.samplers import SAMPLERS
from dist_vsd.priors.table import load_prior, prior_row
from dist_vsd.writable import require_writable_file, require_writable_folder

SAMPLE = """Draw pictures from a prior by DDIM or DPM-Solver++, or from a rectified flow by Euler's steps.

dist-vsd prior sample "a red car, front view" --out car.png"""
TRAIN = """Train the embedded prior anew: pictures, VAE, denoiser, CLIP, measurements, model card.

Under two hours on two CPU cores. Stopped at any time, the same command goes on. Each other --kind has flags of its own."""
TRAIN_MULTI_VIEW = """Teach the embedded prior four views of an object together, and normal maps: groups of views, denoiser, model card.

Under 90 minutes on two CPU cores. Stopped at any time, the same command goes on."""
TRAIN_FLOW = """Train a rectified flow of the embedded prior's world, by a transformer as Stable Diffusion 3 has: pictures, flow, card.

Under an hour on two CPU cores. Stopped at any time, the same command goes on."""
HELP = """usage: dist-vsd prior sample|train [OPTIONS]

  sample   draw pictures from any prior
  train    train the embedded prior by its recipe; --kind multiview: the one of four views; flow: the rectified flow
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleArguments:
    """What `prior sample` takes."""

    prompt: tyro.conf.Positional[str]
    """What to draw."""
    out: str = "sample.png"
    """The picture; several samples stand side by side, of a multi-view prior one below the other."""
    prior: str = "embedded"
    """embedded, embedded-multiview, embedded-flow, a pipeline folder, FILE.safetensors[+FOLDER], or a hub id[@revision]."""
    num_samples: int = 4
    """Pictures to draw."""
    num_steps: int = 50
    """Of the sampler."""
    sampler: str = ""
    """ddim or dpmsolver++; of a flow euler; empty: ddim or euler."""
    guidance_scale: float = 7.5
    """Classifier-free guidance s."""
    seed: int = 0
    """Of the first picture; the next ones follow."""
    enlarge: int = 2
    """Times that each pixel is repeated a side."""
    flow: FlowConfig = FlowConfig()
    """Of a prior that is a rectified flow."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError('the prompt is empty: give one, as in dist-vsd prior sample "a red car, front view"')
        for name in ("num_samples", "num_steps", "enlarge"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.guidance_scale < math.inf:
            raise ValueError(f"--guidance-scale must be a number from 0 on, got {self.guidance_scale}: change it")
        if self.seed < 0:
            raise ValueError(f"--seed must be 0 or more, got {self.seed}: change it")
        if self.sampler not in ("", *SAMPLERS):
            near = nearest_command(self.sampler, SAMPLERS)
            raise ValueError(f"--sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}{near}: change --sampler")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderArguments:
    """Where `prior train` reads and writes."""

    kind: str = "embedded"
    """embedded, the prior of single views; or multiview or flow, made from it."""
    out: str = "prior"
    """Folder for the finished prior; use it with --prior."""
    work_dir: str = ".prior_work"
    """Folder for pictures and the states of unfinished stages; may be removed afterwards."""
    note: str = ""
    """A sentence for the model card."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainArguments(FolderArguments):
    """What `prior train` takes."""

    recipe: Annotated[RecipeConfig, tyro.conf.arg(name="")] = RecipeConfig()
    """Lengths and seed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiViewTrainArguments(FolderArguments):
    """What `prior train --kind multiview` takes."""

    recipe: Annotated[MultiViewRecipeConfig, tyro.conf.arg(name="")] = MultiViewRecipeConfig()
    """Lengths and seed."""
    base: str = "embedded"
    """embedded, or the folder of a prior of single views that this command made."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowTrainArguments(FolderArguments):
    """What `prior train --kind flow` takes."""

    recipe: Annotated[FlowRecipeConfig, tyro.conf.arg(name="")] = FlowRecipeConfig()
    """Lengths and seed."""
    base: str = "embedded"
    """embedded, or the folder of a prior of single views that this command made: its VAE and its text encoder are taken."""


# The words of each kind, and its page.
KINDS = {
    "embedded": (TrainArguments, TRAIN),
    "multiview": (MultiViewTrainArguments, TRAIN_MULTI_VIEW),
    "flow": (FlowTrainArguments, TRAIN_FLOW),
}


def run(arguments: list[str]) -> int:
    """Run the command; see cli.main for the exit codes."""
    actions = {"sample": run_sample, "train": run_train}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if arguments[0] not in actions:
        raise ValueError(f"prior {arguments[0]!r} does not exist{nearest_command(arguments[0], actions)}: use sample or train")
    return actions[arguments[0]](arguments[1:])


def run_sample(arguments: list[str]) -> int:
    """Draw pictures and write them as one PNG."""
    parsed = parse(SampleArguments, arguments, "prior sample", SAMPLE)
    file = Path(parsed.out)
    if file.suffix.lower() != ".png":
        raise ValueError(f"--out must be a .png file, got {parsed.out!r}")
    require_writable_file(file, f"--out {parsed.out!r}")

    prior_row(parsed.prior).check(parsed.prior, [parsed.prompt], flow=parsed.flow)
    prior_row(parsed.prior).require_sampler(parsed.sampler)  # one of the hub has come by now, and says what it is

    import torch
    from torch import Tensor

    from dist_vsd.device import best_device
    from dist_vsd.image_files import enlarge, tile, write_png
    from dist_vsd.priors.sampling import sample_images
    from dist_vsd.scaling.counted_memory import CountedMemory
    from dist_vsd.scaling.fit import SizeFlag
    from dist_vsd.scaling.memory import Memory, telling_out_of_memory

    device = best_device()
    memory = Memory.of(device)

    def draw(num_samples: int, num_steps: int) -> Tensor:
        seeds = range(parsed.seed, parsed.seed + num_samples)
        return sample_images(prior, [parsed.prompt] * num_samples, num_steps, parsed.guidance_scale, seeds, parsed.sampler)

    def advice(memory: Memory) -> str:
        with CountedMemory() as count:
            draw(1, 1)
        return SizeFlag("--num-samples", parsed.num_samples, lambda number: number * count.peak_bytes).advice(memory)

    with telling_out_of_memory(memory, advice):
        prior = load_prior(parsed.prior, device, flow=parsed.flow)
        views = draw(parsed.num_samples, parsed.num_steps).split(prior.views_per_shot)
        rows = list(views) if prior.views_per_shot > 1 else [torch.cat(views)]
        write_png(enlarge(tile(rows), parsed.enlarge), file)
    print(f"{parsed.num_samples} sample(s) of {parsed.prompt!r}: {file}")
    return 0


def run_train(arguments: list[str]) -> int:
    """Run a recipe and write the pipeline folder with its card."""
    parsed = read_train(arguments)
    out, work = Path(parsed.out), Path(parsed.work_dir)
    base = None if isinstance(parsed, TrainArguments) else find_base(parsed.base)
    require_writable_folder(out, f"--out {parsed.out!r}")
    require_writable_folder(work, f"--work-dir {parsed.work_dir!r}")
    if isinstance(parsed, FlowTrainArguments):
        figures = _train_flow(parsed, base, out, work)
    elif isinstance(parsed, MultiViewTrainArguments):
        figures = _train_multi_view(parsed, base, out, work)
    else:
        figures = _train_single_views(parsed, out, work)
    for name, value in figures.items():
        print(f"{name}: {value}")
    print(f"the prior is in {out}; its card is {out / 'README.md'}")
    return 0


def read_train(arguments: list[str]) -> TrainArguments | MultiViewTrainArguments | FlowTrainArguments:
    """Read the words of `prior train`, of which the last --kind decides which others there are; ValueError for what is wrong with them."""
    kind = "embedded"
    for word, after in itertools.pairwise([*arguments, ""]):
        if word.startswith("--kind="):
            kind = word.partition("=")[2]
        elif word == "--kind":
            kind = after
    if kind not in KINDS:
        raise ValueError(f"--kind must be one of {', '.join(KINDS)}, got {kind!r}{nearest_command(kind, KINDS)}: change --kind")
    words, page = KINDS[kind]
    return parse(words, arguments, "prior train", page)


def find_base(base: str) -> PipelineFolder:
    """Resolve what a recipe starts from that is not the embedded prior's own.

    Raises:
        ValueError: it is no prior, or not one of single views of the embedded world.
    """
    folder = find_pipeline(base)
    if not folder.facts.get("vocabulary") or folder.facts.get("views_per_shot", 1) != 1 or folder.kind in FLOWS:
        raise ValueError(f"--base {base!r} is not the embedded prior, nor one of single views that dist-vsd prior train made: give one")
    return folder


def _train_multi_view(parsed: MultiViewTrainArguments, base: PipelineFolder, out: Path, work: Path) -> dict[str, Any]:
    from dist_vsd.device import best_device
    from dist_vsd.priors.embedded.multi_view_card import measure, write_card
    from dist_vsd.priors.embedded.multi_view_recipe import train_multi_view, write_multi_view
    from dist_vsd.priors.embedded.recipe import LineReporter

    device = best_device()
    networks, held_out = train_multi_view(parsed.recipe, base.path, work, device, LineReporter())
    write_multi_view(networks, base.path, out)
    print("measuring", flush=True)
    figures = measure(out, held_out, device)
    write_card(out, figures, dataclasses.asdict(parsed.recipe), parsed.note)
    return figures


def _train_flow(parsed: FlowTrainArguments, base: PipelineFolder, out: Path, work: Path) -> dict[str, Any]:
    from dist_vsd.device import best_device
    from dist_vsd.priors.embedded.flow_card import measure, write_card
    from dist_vsd.priors.embedded.flow_recipe import train_flow, write_flow
    from dist_vsd.priors.embedded.recipe import LineReporter

    device = best_device()
    # A folder of its own: its pictures are fewer than those of the embedded prior's recipe, which may be there too.
    networks, held_out = train_flow(parsed.recipe, base.path, work / "flow", device, LineReporter())
    write_flow(networks, base.path, out)
    print("measuring", flush=True)
    figures = measure(out, held_out, device)
    write_card(out, figures, dataclasses.asdict(parsed.recipe), parsed.note)
    return figures


def _train_single_views(parsed: TrainArguments, out: Path, work: Path) -> dict[str, Any]:
    from dist_vsd.device import best_device
    from dist_vsd.priors.embedded.card import measure, write_card
    from dist_vsd.priors.embedded.recipe import LineReporter, train_prior, write_prior

    device = best_device()
    prior, held_out = train_prior(parsed.recipe, work, device, LineReporter())
    write_prior(prior, out)
    print("measuring", flush=True)
    figures = measure(out, held_out, device)
    settings = dataclasses.asdict(parsed.recipe)
    write_card(out, figures, settings, parsed.note)
    return figures
