"""`dist-vsd train`: optimise particles for a prompt, on one process or on all ranks of a launcher."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dist_vsd.commands.arguments import parse
from dist_vsd.config import DEFAULT_PRESET, RunConfig, load_preset, merge, read_yaml
from dist_vsd.priors.pipeline_folder import check_vocabulary, find_pipeline
from dist_vsd.training.run_directory import RunDirectory, default_run_dir

if TYPE_CHECKING:
    from dist_vsd.distributed.collectives import Collectives
    from dist_vsd.training.state import TrainingState

DESCRIPTION = """Optimise n particles of one prompt by score distillation.

One process:    dist-vsd train "a green duck" --num-particles 2
Two CPU ranks:  accelerate launch --config_file launch_configs/cpu.yaml -m dist_vsd train "a green duck" --num-particles 2
Stable Diffusion on a GPU:  dist-vsd train "a pineapple" --preset stable-diffusion --prior path/to/stable-diffusion-2-1-base

Values are taken from the preset, then from --config FILE (YAML, the names below with nesting), then from flags.
Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and exit with 75; --resume goes on to the bit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """What `train` takes beside the run's configuration."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    preset: str = DEFAULT_PRESET
    """Where the defaults come from; `dist-vsd info` lists the presets."""
    config: str = ""
    """A YAML file with values that replace the preset's."""
    dry_run: bool = False
    """Print the resolved configuration, the layout, and memory and time estimates; write nothing."""


def run(arguments: list[str]) -> int:
    """Run the command; see cli.main for the exit codes."""
    parsed = _parse(arguments)
    config = _with_prompt(parsed.run)
    config = dataclasses.replace(config, run_dir=str(_run_dir(config)))
    directory = RunDirectory(Path(config.run_dir))
    directory.check(config)

    check_vocabulary([config.prompt, config.negative_prompt], find_pipeline(config.prior))

    # The heavy imports wait until the words on the command line are known to be right.
    from dist_vsd.commands.process import start_process
    from dist_vsd.distributed.collectives import Collectives
    from dist_vsd.distributed.layout import Layout

    process = start_process()
    layout = Layout.of(config.num_particles, process.world_size, process.rank)
    if parsed.dry_run:
        from dist_vsd.commands.estimate import print_estimate

        return print_estimate(config, layout, process.device)

    from dist_vsd.training.loop import train
    from dist_vsd.training.preemption import StopRequest
    from dist_vsd.training.state import build_state

    stop = StopRequest().install()
    begin = time.monotonic()
    collectives = Collectives(layout)
    collectives.require_equal("the configuration", dataclasses.asdict(config))
    state = build_state(config, layout, process.device)
    agree(collectives, lambda: directory.claim(config) if layout.rank == 0 else None)
    done = train(state, directory, stop)
    say = print if layout.rank == 0 else _ignore
    if not done:
        say(f"stopped by {stop.signal_name or 'another rank'}; everything is saved. Go on with the same command and --resume:")
        say(f"  dist-vsd train --resume --run-dir {config.run_dir}")
        return 75
    write_turntables(state, directory.path)
    collectives.barrier()
    say(f"done in {(time.monotonic() - begin) / 60:.1f} minutes: turntables of {config.num_particles} particle(s) are in")
    say(f"  {directory.path / 'export'}")
    return 0


def _ignore(_text: str) -> None:
    """Print nothing."""


def _parse(arguments: list[str]) -> TrainArguments:
    """Parse the flags over the preset and --config; or, with --resume, over the saved run's configuration and --config."""
    preset, config_file = _early_value(arguments, "--preset") or DEFAULT_PRESET, _early_value(arguments, "--config")
    yaml_values = read_yaml(Path(config_file)) if config_file else {}

    def parse_over(config: RunConfig) -> TrainArguments:
        if config_file:
            config = merge(config, yaml_values, config_file)
        return parse(TrainArguments, arguments, "train", DESCRIPTION, TrainArguments(run=config, preset=preset))

    parsed = parse_over(load_preset(preset))
    if not parsed.run.resume:
        return parsed
    directory = RunDirectory(_run_dir(_with_prompt(parsed.run, may_be_empty=True)))
    saved = directory.saved_config()
    if saved is None:
        return parsed
    saved |= {"run_dir": str(directory.path), "prompt_file": ""}  # the prompt itself stands in the configuration
    return parse_over(merge(RunConfig(), saved, str(directory.config_file)))


def _early_value(arguments: list[str], name: str) -> str:
    """Return the value of a flag that must be known before the others can be parsed; empty without it."""
    for i, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if key.replace("_", "-") == name:
            return value if equals else (arguments[i + 1] if i + 1 < len(arguments) else "")
    return ""


def _run_dir(config: RunConfig) -> Path:
    return Path(config.run_dir) if config.run_dir else default_run_dir(config.prompt)


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


def agree(collectives: Collectives, action: Callable[[], None]) -> None:
    """Do something that only some ranks do, and raise its ValueError on all of them (collective)."""
    message = None
    try:
        action()
    except ValueError as error:
        message = str(error)
    messages = [m for m in collectives.gather_json(message) if m]
    if messages:
        raise ValueError(messages[0])


def write_turntables(state: TrainingState, path: Path) -> None:
    """Write a turntable of each particle that this rank owns into ``path``/export."""
    from dist_vsd.cameras import turntable
    from dist_vsd.export.turntable import render_views, write_turntable

    config, device = state.config, state.prior.device
    cameras = turntable(40, 15.0, sum(config.camera.distance) / 2, sum(config.camera.fov_deg) / 2).to(device)
    for particle in state.particles:
        if state.layout.owner(particle.id) == state.layout.rank:
            frames = render_views(particle.theta, cameras, max(128, config.render_size))
            write_turntable(frames, path / "export" / f"turntable_{particle.id:04d}")

