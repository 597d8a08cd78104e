"""A run on wandb: a reporter that starts the process which follows the run (reporting/wandb_follower.py), and hears of its troubles."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from dist_vsd.config import RunConfig
from dist_vsd.config_files import to_mapping
from dist_vsd.reporting.metrics import RankZeroReporter, SilentReporter
from dist_vsd.reporting.reporter import Reporter
from dist_vsd.reporting.wandb_follower import DONE, STOPPED, Recording, has_key, resolve_mode

FOLLOWER = ("-m", "dist_vsd.reporting.wandb_follower")
ID_FILE, DEFAULT_PROJECT = "wandb_id", "dist_vsd"
# The follower's own limits (20 s to begin, 30 s to finish) and a little: what the end of a run can be delayed by.
CLOSE_SECONDS = 60.0
STOPPED_SECONDS = 10.0  # of a run that was stopped, and soon killed perhaps: what is missing is made up for when it goes on
FAILED_SECONDS = 5.0  # of a run that failed: other ranks wait for this one's end
RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")  # such as wandb accepts and a path may hold


class WandbReporter:
    """Reports to another reporter, whose metrics.jsonl wandb's process follows.

    Args:
        inner: writes metrics.jsonl; it is also told what goes wrong with wandb, once.
        config: of the run.
        run_dir: of the run.
        mode: "online" or "offline".
    """

    takes_media = True

    def __init__(self, inner: Reporter, config: RunConfig, run_dir: Path, mode: str) -> None:
        self._inner, self._update = inner, 0
        self._process: subprocess.Popen[bytes] | None = None
        try:
            recording = recording_of(config, run_dir, mode, os.environ)
            command, environment = [sys.executable, *FOLLOWER], environment_of(run_dir, os.environ)
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            # A session of its own: a Ctrl-C at the terminal is the run's to answer.
            self._process = subprocess.Popen(command, env=environment, start_new_session=True, bufsize=0, **pipes)
            os.set_blocking(self._process.stdout.fileno(), False)
            self._say(json.dumps(dataclasses.asdict(recording)))
        except OSError as error:
            inner.event(0, f"wandb's process can't be started ({error.strerror}): the run goes on without it")

    def log(self, update: int, figures: dict[str, float]) -> None:
        """Pass figures on; the follower reads them from metrics.jsonl."""
        self._inner.log(update, figures)

    def show(self, update: int, media: dict[str, list[str]]) -> None:
        """Pass media on; the follower reads of them in metrics.jsonl."""
        self._inner.show(update, media)

    def event(self, update: int, text: str) -> None:
        """Pass an event on."""
        self._inner.event(update, text)

    def advance(self, update: int) -> None:
        """Pass progress on, and any trouble that wandb's process told meanwhile."""
        self._update = update
        self._inner.advance(update)
        self._listen()
        if self._process is not None and self._process.poll() is not None:
            self._inner.event(update, "wandb's process has ended: the run goes on, metrics.jsonl holds what it logs")
            self._release()

    def close(self, exit_code: int = 0) -> None:
        """Let wandb's process finish, for CLOSE_SECONDS at most; STOPPED_SECONDS after a stop, FAILED_SECONDS after a failure."""
        if self._process is not None:
            self._say(str(exit_code))
            seconds = {DONE: CLOSE_SECONDS, STOPPED: STOPPED_SECONDS}.get(exit_code, FAILED_SECONDS)
            try:
                self._process.wait(seconds)
                self._listen()
            except subprocess.TimeoutExpired:
                rest = "is made up for when the run goes on" if exit_code == STOPPED else "can be uploaded with wandb sync"
                self._inner.event(self._update, f"wandb has not finished after {seconds:.0f} s: what is missing {rest}")
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._release()
        self._inner.close(exit_code)

    def _release(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process = None

    def _say(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, which _listen tells
            self._process.stdin.write(line.encode() + b"\n")

    def _listen(self) -> None:
        if self._process is None:
            return
        text = b""
        with contextlib.suppress(BlockingIOError):
            text = os.read(self._process.stdout.fileno(), 1 << 16)
        for line in text.decode(errors="replace").splitlines():
            self._inner.event(self._update, line)


def recording_of(config: RunConfig, run_dir: Path, mode: str, environment: Mapping[str, str]) -> Recording:
    """Return what shall be recorded of a run; wandb's environment variables hold where the configuration says nothing."""
    wandb = config.wandb
    return Recording(
        run_dir=str(run_dir.absolute()),
        mode=mode,
        run_id=run_id_of(run_dir, environment),
        project=wandb.project or environment.get("WANDB_PROJECT") or DEFAULT_PROJECT,
        entity=wandb.entity or None,
        group=wandb.group or None,
        name=wandb.name or environment.get("WANDB_NAME") or run_dir.absolute().name,
        tags=list(dict.fromkeys([config.objective, config.representation, *wandb.tags])),
        config=to_mapping(config),
        pid=os.getpid(),
    )


def run_id_of(run_dir: Path, environment: Mapping[str, str]) -> str:
    """Return wandb's id of a run, kept in the run directory: its first start takes an agent's, or makes one."""
    file = run_dir / ID_FILE
    with contextlib.suppress(OSError, UnicodeDecodeError):
        kept = file.read_text().strip()
        if RUN_ID.fullmatch(kept):
            return kept
    given = environment.get("WANDB_RUN_ID", "")
    run_id = given if RUN_ID.fullmatch(given) else secrets.token_hex(8)
    temporary = run_dir / f".{ID_FILE}"
    temporary.write_text(run_id + "\n")
    temporary.replace(file)
    return run_id


def environment_of(run_dir: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of wandb's process: all its files in the run directory, and no reports about its own errors."""
    own = str(run_dir.absolute() / "wandb" / "artifacts")
    return {"WANDB_ERROR_REPORTING": "false", **environment, "WANDB_DATA_DIR": own, "WANDB_CACHE_DIR": own, "WANDB_ARTIFACT_DIR": own}


def open_reporter(config: RunConfig, rank: int, run_dir: Path, first_update: int) -> Reporter:
    """Return this rank's reporter: silent but on rank 0, and with wandb where it is not disabled.

    Args:
        config: of the run.
        rank: of this process.
        run_dir: of the run, claimed.
        first_update: updates done already.
    """
    if rank:
        return SilentReporter()
    reporter = RankZeroReporter(run_dir / "metrics.jsonl", first_update, config.num_updates)
    mode = resolve_mode(config.wandb.mode, os.environ, has_key)
    return reporter if mode == "disabled" else WandbReporter(reporter, config, run_dir, mode)
