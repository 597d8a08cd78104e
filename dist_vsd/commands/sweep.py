"""`dist-vsd sweep ...`: many runs from a file of prompts, on a Slurm cluster or on this machine."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dist_vsd.commands.arguments import nearest_command, parse
from dist_vsd.errors import RunFailed
from dist_vsd.sweep.manifest import read_sweep, require_writable_sweep
from dist_vsd.sweep.slurm import SlurmOptions

if TYPE_CHECKING:
    from dist_vsd.sweep.manifest import Sweep

HELP = """usage: dist-vsd sweep {actions} [OPTIONS]

  plan       make a sweep's directory from a file of prompts: a run for each prompt, seed and setting
  submit     run what is not done: as a Slurm array, or here with --local --jobs N
  status     where every run stands; --json for programs
  retry      submit the runs that failed
  cancel     save and stop what runs, take the rest out of the queue
  collect    results.csv, and a page to look at
  dashboard  a wandb workspace for the sweep's runs
  run        one run of a sweep: what a Slurm task does

`dist-vsd sweep plan --help`, and so on, explains each.
"""
SUBMIT = """Run what is neither done nor failed, and nobody is to run yet. The same line again submits only what is still missing.

  dist-vsd sweep submit sweeps/prompts --partition gpu --time 04:00:00 --gpus-per-node 1 --limit 16
  dist-vsd sweep submit sweeps/prompts --local --jobs 2

--local runs them here, without Slurm, and waits; Ctrl-C saves, and the same line goes on."""
RETRY = """Submit the runs that failed, with the options of `submit`; a run that had begun goes on from its newest checkpoint."""
STATUS = """Show how many runs wait, run, were stopped early, are done or failed, and the runs that matter most."""
CANCEL = """Ask what runs to save and stop, and take what waits out of the queue; `submit` goes on."""
DASHBOARD = """Build a wandb workspace for the runs of a sweep, grouped by prompt and objective, and push it."""
RUN = """Do one run of a sweep, or go on with it. Does nothing if it is done, or if another process does it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubmitArguments:
    """What `sweep submit` and `sweep retry` take."""

    sweep_dir: tyro.conf.Positional[str]
    """The sweep's directory."""
    local: bool = False
    """Run here, without Slurm, and wait until all have ended."""
    jobs: int = 1
    """Runs at the same time, with --local."""
    dry_run: bool = False
    """Say what would be submitted; submit and write nothing."""
    slurm: Annotated[SlurmOptions, tyro.conf.arg(name="")] = SlurmOptions()
    """What Slurm is asked for."""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, got {self.jobs}: raise --jobs")
        if self.jobs > 1 and not self.local:
            raise ValueError(f"--jobs {self.jobs} goes with --local; on Slurm, --limit says how many tasks run at the same time")
        if self.local and self.slurm != SlurmOptions():
            raise ValueError("--local takes no options of Slurm: drop them, or drop --local")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatusArguments:
    """What `sweep status` takes."""

    sweep_dir: tyro.conf.Positional[str]
    """The sweep's directory."""
    json: bool = False
    """Print totals and all runs as JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CancelArguments:
    """What `sweep cancel` takes."""

    sweep_dir: tyro.conf.Positional[str]
    """The sweep's directory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DashboardArguments:
    """What `sweep dashboard` takes."""

    sweep_dir: tyro.conf.Positional[str]
    """The sweep's directory."""
    entity: str = ""
    """User or team on wandb; empty: WANDB_ENTITY, or the key's own."""
    project: str = ""
    """Of wandb; empty: WANDB_PROJECT, or dist_vsd, as for the runs."""
    dry_run: bool = False
    """Print what would be pushed, as JSON; needs no network."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunArguments:
    """What `sweep run` takes."""

    sweep_dir: tyro.conf.Positional[str]
    """The sweep's directory."""
    id: str = ""
    """The run's id, as `sweep status --json` tells it."""
    submission: str = ""
    """A submission's file, with --task, in place of --id."""
    task: int = -1
    """The run's position in that submission, from 0."""

    def __post_init__(self) -> None:
        if bool(self.id) == bool(self.submission):
            raise ValueError("sweep run takes either --id ID or --submission FILE --task N: give one of them")
        if bool(self.submission) != (self.task >= 0):
            raise ValueError("--submission FILE and --task N go together: give both")


def run(arguments: list[str]) -> int:
    """Run the command; see cli.main for the exit codes."""
    actions = {
        "plan": _run_plan,
        "submit": run_submit,
        "status": run_status,
        "retry": run_retry,
        "cancel": run_cancel,
        "collect": _run_collect,
        "dashboard": run_dashboard,
        "run": run_run,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP.format(actions="|".join(actions)), end="")
        return 0
    if arguments[0] not in actions:
        raise ValueError(f"sweep {arguments[0]!r} does not exist{nearest_command(arguments[0], actions)}: use one of {', '.join(actions)}")
    return actions[arguments[0]](arguments[1:])


def _run_plan(arguments: list[str]) -> int:
    from dist_vsd.commands.sweep_plan import run_plan

    return run_plan(arguments)


def _run_collect(arguments: list[str]) -> int:
    from dist_vsd.commands.sweep_collect import run_collect

    return run_collect(arguments)


def run_submit(arguments: list[str]) -> int:
    """Submit what is neither done, failed, running nor queued."""
    from dist_vsd.sweep.submit import SUBMITTED

    return _submit(parse(SubmitArguments, arguments, "sweep submit", SUBMIT), SUBMITTED)


def run_retry(arguments: list[str]) -> int:
    """Submit what failed."""
    from dist_vsd.sweep.submit import RETRIED

    return _submit(parse(SubmitArguments, arguments, "sweep retry", RETRY), RETRIED)


def _submit(parsed: SubmitArguments, wanted: frozenset[str]) -> int:
    from dist_vsd.sweep.submit import submit_locally, submit_to_slurm

    sweep = read_sweep(Path(parsed.sweep_dir))
    if not parsed.dry_run:
        require_writable_sweep(sweep)
    if parsed.local:
        return submit_locally(sweep, wanted, parsed.jobs, parsed.dry_run)
    submit_to_slurm(sweep, wanted, parsed.slurm, parsed.dry_run)
    return 0


def run_status(arguments: list[str]) -> int:
    """Print totals and a table, or JSON."""
    parsed = parse(StatusArguments, arguments, "sweep status", STATUS)
    from dist_vsd.sweep.faces import faces_of
    from dist_vsd.sweep.state import states_of
    from dist_vsd.sweep.status_table import table, to_json, totals, totals_line
    from dist_vsd.sweep.submit import SUBMITTED

    sweep = read_sweep(Path(parsed.sweep_dir))
    states = states_of(sweep)
    counts, faces = totals(states.values()), faces_of(sweep, states)
    if parsed.json:
        told = {"faces": faces.to_json()} if faces else {}
        print(json.dumps({"name": sweep.settings.name, "totals": counts, **told, "runs": to_json(states.values())}, indent=1))
        return 0
    from rich.console import Console

    rows, num_left_out = table(states.values())
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    console.print(rows)
    if num_left_out:
        print(f"... and {num_left_out} more: --json shows all")
    print(totals_line(counts, _num_queued(sweep, {name for name, state in states.items() if state.state in SUBMITTED})))
    if faces:
        print(faces.line())
    return 0


def _num_queued(sweep: Sweep, idle: set[str]) -> int | None:
    """Return how many of the runs that nobody runs will be started by a submission; None, and a line, if Slurm does not answer."""
    from dist_vsd.sweep.submit import queued_runs

    try:
        return len(queued_runs(sweep) & idle)
    except RunFailed as error:
        print(f"what is queued is not known: {error}")
        return None


def run_cancel(arguments: list[str]) -> int:
    """Stop a sweep, everything saved."""
    parsed = parse(CancelArguments, arguments, "sweep cancel", CANCEL)
    from dist_vsd.sweep.cancel import cancel

    sweep = read_sweep(Path(parsed.sweep_dir))
    require_writable_sweep(sweep)
    print("\n".join(cancel(sweep) or ["nothing is queued or running"]))
    return 0


def run_dashboard(arguments: list[str]) -> int:
    """Build the workspace, and push it."""
    parsed = parse(DashboardArguments, arguments, "sweep dashboard", DASHBOARD)
    from dist_vsd.sweep.dashboard import build_workspace, push, serialize

    sweep = read_sweep(Path(parsed.sweep_dir))
    entity = parsed.entity or os.environ.get("WANDB_ENTITY", "")
    project = parsed.project or os.environ.get("WANDB_PROJECT") or "dist_vsd"
    workspace = build_workspace(sweep.settings.name, entity, project)
    print(serialize(workspace) if parsed.dry_run else f"the dashboard of {sweep.settings.name} is at\n  {push(workspace)}")
    return 0


def run_run(arguments: list[str]) -> int:
    """Do one run."""
    parsed = parse(RunArguments, arguments, "sweep run", RUN)
    from dist_vsd.sweep.execute import execute
    from dist_vsd.sweep.submissions import find_run, read_submission

    sweep = read_sweep(Path(parsed.sweep_dir))
    require_writable_sweep(sweep)
    if parsed.id:
        return execute(sweep, find_run(sweep, parsed.id))
    submission = read_submission(Path(parsed.submission))
    if parsed.task >= len(submission.runs):
        raise ValueError(f"--task must be below {len(submission.runs)}, the runs of {parsed.submission}, got {parsed.task}")
    return execute(sweep, find_run(sweep, submission.runs[parsed.task]), submission)
