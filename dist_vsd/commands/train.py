"""`dist-vsd train`: optimise particles for a prompt, on one process or on all ranks of a launcher."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dist_vsd.commands.train_words import TrainArguments, prepare
from dist_vsd.config import RunConfig
from dist_vsd.config_files import to_mapping
from dist_vsd.priors.table import prior_row
from dist_vsd.runs.run_directory import RunDirectory
from dist_vsd.training.stages import Stage, stage_after, stages_of

if TYPE_CHECKING:
    import torch

    from dist_vsd.distributed.collectives import Collectives
    from dist_vsd.distributed.layout import Layout
    from dist_vsd.distributed.process import Process
    from dist_vsd.reporting.reporter import Reporter
    from dist_vsd.runs.start import GoingOn
    from dist_vsd.runs.stop_request import StopRequest
    from dist_vsd.scaling.memory import Memory
    from dist_vsd.training.state import TrainingState


def run(arguments: list[str]) -> int:
    """Run the command; see cli.main for the exit codes."""
    refusal, parsed = "", None
    try:
        parsed, config, directory = prepare(arguments)
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
    from dist_vsd.runs.stop_request import StopRequest

    views_per_shot = prior_row(config.prior).views_per_shot
    layout = Layout.of(config.num_particles, process.world_size, process.rank, config.num_views, config.num_shards, views_per_shot)
    config = dataclasses.replace(config, precision=process.precision, num_views=layout.num_views)
    for stage in stages_of(config):
        check_start(stage.config, process)
    stop, begin = StopRequest(), time.monotonic()
    if not parsed.dry_run:
        stop.install()
    with naming_lost_ranks("while it began"):
        collectives = Collectives(layout)
        check_same_start(collectives, to_mapping(config))
        agree(collectives, lambda: check_memory(stages_of(config), layout, process.device))
        if not parsed.dry_run:
            config = settle_tiles(config, layout, process.device, collectives)

    # Here the libraries of the networks are imported: whatever can be refused was refused.
    from dist_vsd.commands.estimate import print_estimate
    from dist_vsd.runs.start import going_on
    from dist_vsd.scaling.memory import Memory, telling_out_of_memory
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
        pictures = "pictures" if config.is_flat else "turntables and meshes"
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
    from dist_vsd.runs.start import begin
    from dist_vsd.scaling.memory import telling_out_of_memory

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
            for note in [*where.notes, *notes, *_kernels_of(state)]:
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


def settle_tiles(config: RunConfig, layout: Layout, device: torch.device, collectives: Collectives) -> RunConfig:
    """Choose by the free memory of all GPUs in what tiles fields are asked, the same on all ranks (collective); ValueError if none fit."""
    from dist_vsd.device import is_accelerator
    from dist_vsd.scaling.memory import Memory
    from dist_vsd.scaling.room import Tiles, choose_tiles, with_tiles

    if not is_accelerator(device):
        return config
    chosen: list[Tiles] = []
    agree(collectives, lambda: chosen.extend(choose_tiles(stage.config, layout, Memory.of(device)) for stage in stages_of(config)))
    if layout.rank == 0:
        print(f"an update takes, by a count, {max(chosen, key=lambda tiles: tiles.peak.num_bytes)}", flush=True)
    points = [points for rank in collectives.gather_json([tiles.points for tiles in chosen]) for points in rank if points]
    return with_tiles(config, min(points, default=0))


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
    from dist_vsd.reporting.stage_figures import StageFigures
    from dist_vsd.training.loop import train

    with naming_lost_ranks("while it ran"):
        (takes_media,) = state.collectives.any_of([reporter.takes_media])
        preview = Preview(state, directory, reporter, takes_media)
        return train(state, first, directory, stop, StageFigures(state, reporter), preview)


def _export(state: TrainingState, directory: RunDirectory, reporter: Reporter) -> None:
    """Write turntables and meshes (collective)."""
    from dist_vsd.distributed.collectives import naming_lost_ranks
    from dist_vsd.export.end_of_run import write_meshes, write_pictures

    with naming_lost_ranks("while particles were exported"):
        (takes_media,) = state.collectives.any_of([reporter.takes_media])
        if state.config.turntables:
            write_pictures(state, directory.path)
        if (takes_media or state.config.turntables) and state.config.representation_row.is_solid:
            write_meshes(state, directory.path, reporter)
        state.collectives.barrier()


def _ignore(_text: str) -> None:
    """Print nothing."""


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


def _kernels_of(state: TrainingState) -> list[str]:
    """Return the line that says what renders fields."""
    from dist_vsd.kernels.choice import kernels_in_words

    return [f"fields are rendered by {kernels_in_words(state.prior.device)}"] if state.config.representation_row.is_solid else []


def check_start(config: RunConfig, process: Process) -> None:
    """Refuse combinations of configuration and machine that can't keep what they promise.

    Raises:
        ValueError: see above.
    """
    if config.representation_row.is_solid:
        from dist_vsd.kernels.choice import implementation

        implementation(process.device)  # refuses what DIST_VSD_KERNELS asks for in vain
    if config.compile != "off" and process.zero_stage == 3:
        raise ValueError("--compile can't go with ZeRO 3, which gathers weights in hooks inside the blocks: use ZeRO 2, or drop --compile")
    if config.deterministic and process.zero_stage:
        raise ValueError("--deterministic sums gradients itself, a DeepSpeed configuration does too: use one of the two")
    if not config.deterministic:
        return
    if process.device.type == "cuda" and config.representation_row.is_solid and config.field.encoding == "dense":
        raise ValueError("--deterministic on a GPU: dense grids have no deterministic gradient there; use --field.encoding hash")
    from dist_vsd.device import use_fixed_order

    use_fixed_order()


