"""A run's directory: whose it is, and what may be written into it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dist_vsd.config import RunConfig, flag
from dist_vsd.config_files import FREE_ON_RESUME, differences, merge, read_saved, to_mapping, to_yaml
from dist_vsd.errors import RunFailed
from dist_vsd.runs.outcome import (
    CONFIG_FILE,
    LOCK_FILE,
    OUTCOME_FILE,
    REQUEUES_FILE,
    Outcome,
    newest_update,
    read_outcome,
    slurm_attempt,
    write_outcome,
)
from dist_vsd.writable import TRIAL_PREFIX, require_writable_file, require_writable_folder

# Of a process that ended between making the folder and its configuration.
LEFT_BY_A_CRASH = (LOCK_FILE, "config.tmp", REQUEUES_FILE, "requeues.tmp")
METRICS_FILE = "metrics.jsonl"


def split_stage(path: Path) -> tuple[Path, str]:
    """Return the run directory of RUN_DIR@STAGE and the stage's name, which is empty where a run directory alone is named."""
    directory, at, stage = str(path).rpartition("@")
    return (path, "") if not at or path.is_dir() else (Path(directory), stage)


def output_folder(path: str, name: str) -> Path:
    """Return where files of a run directory are written, in a folder of it; of RUN_DIR@STAGE in a folder of that with the stage's name."""
    directory, stage = split_stage(Path(path))
    return directory / name / stage


class RunDirectory:
    """The folder of one run.

    Args:
        path: of the folder; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / CONFIG_FILE

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def check(self, config: RunConfig) -> None:
        """Check, writing nothing, that this run may use the folder.

        Raises:
            ValueError: it holds another run or other files, can't be written, or there is nothing (or something else) to resume.
        """
        try:
            self._check(config)
        except OSError as error:
            raise ValueError(f"run directory {str(self.path)[:80]} can't be used ({error.strerror}): choose another --run-dir") from error

    def _check(self, config: RunConfig) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run directory {self.path} is a file: choose another --run-dir")
        if config.resume:
            if not self.config_file.exists():
                raise ValueError(f"--resume found no run in {self.path}: check --run-dir, or start without --resume")
            self._check_same_run(config)
        elif self.config_file.exists():
            raise ValueError(f"run directory {self.path} holds a run already: continue it with --resume, or choose another --run-dir")
        elif self.path.exists() and any(is_foreign(file.name) for file in self.path.iterdir()):
            raise ValueError(f"run directory {self.path} holds files that are not a run's: choose another --run-dir")
        for name in ("", "checkpoints", "renders", "export") if config.resume else ("",):
            require_writable_folder(self.path / name, f"run directory {self.path / name}", "choose another --run-dir")
        if config.resume:
            require_writable_file(self.path / METRICS_FILE, f"{self.path / METRICS_FILE}", "free it, or choose another --run-dir")

    def saved_config(self) -> dict[str, Any] | None:
        """Return the configuration of the run in the folder, or None without one; ValueError if it can't be read."""
        try:
            return read_saved(self.config_file) if self.config_file.exists() else None
        except OSError as error:
            raise ValueError(f"run directory {str(self.path)[:80]} can't be used ({error.strerror}): choose another --run-dir") from error

    def _check_same_run(self, config: RunConfig) -> None:
        saved = to_mapping(merge(RunConfig(), read_saved(self.config_file), str(self.config_file)))  # with what an older version had not
        changed = [d for d in differences(saved, to_mapping(config)) if d[0] not in FREE_ON_RESUME]
        if changed:
            name, old, new = changed[0]
            raise ValueError(
                f"--resume can't change {name} from {old!r} to {new!r}: the run in {self.path} was made with the former; "
                f"{'give the same prompt' if name == 'prompt' else f'drop {flag(name)}'} or start another run"
            )

    def changed_length(self, config: RunConfig) -> str:
        """Return a line that says what another number of updates means for the run that goes on; empty if it is the same.

        Raises:
            ValueError: more updates than that are done.
        """
        saved = (self.saved_config() or {}).get("num_updates", config.num_updates)
        if not config.resume or saved == config.num_updates:
            return ""
        done = self.newest_update()
        if config.num_updates < done:
            raise ValueError(f"--num-updates must be at least {done}, which are done in {self.path}, got {config.num_updates}: raise it")
        return (
            f"num_updates goes from {saved} to {config.num_updates}: what is a fraction of the whole (the range of t, theta's learning "
            f"rates, regularisers that begin later) goes on from where {config.num_updates} updates have it after {done}"
        )

    def claim(self, config: RunConfig) -> None:
        """Create the folder, lock it for as long as this process lives, and write the configuration; for rank 0.

        Raises:
            ValueError: another living process uses it, or it can't be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / LOCK_FILE, "w")  # noqa: SIM115 - held until the process ends
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (self.path / OUTCOME_FILE).unlink(missing_ok=True)  # without one, a run is under way or was killed
            if not self.config_file.exists() or self.changed_length(config):
                temporary = self.config_file.with_suffix(".tmp")
                temporary.write_text(to_yaml(config))
                temporary.replace(self.config_file)
        except BlockingIOError as error:
            raise ValueError(f"run directory {self.path} is in use by a running process: wait, or choose another --run-dir") from error
        except OSError as error:
            raise ValueError(f"run directory {self.path} can't be written ({error.strerror}): choose another --run-dir") from error

    @contextlib.contextmanager
    def telling_outcome(self) -> Iterator[dict[str, int]]:
        """Write outcome.json as the block ends; for rank 0, after ``claim``.

        Yields:
            A mapping whose ``exit_code`` the block sets. A block that raises has failed (1, or 2 for a ValueError), or was stopped
            at once by Ctrl-C (75).
        """
        ending: dict[str, int] = {}
        error = ""
        try:
            yield ending
        except BaseException as raised:
            ending["exit_code"] = 2 if isinstance(raised, ValueError) else 75 if isinstance(raised, KeyboardInterrupt) else 1
            error = " ".join(f"{'' if isinstance(raised, (ValueError, RunFailed)) else type(raised).__name__ + ': '}{raised}".split())
            raise
        finally:
            update, told = self.newest_update(), error[:500]
            write_outcome(self.path, Outcome(exit_code=ending["exit_code"], update=update, error=told, attempt=slurm_attempt()))

    def tell_failure(self, error: str, rank: int) -> None:
        """Write outcome.json for a process that is about to be ended from outside its main thread, on any rank that sees the folder.

        Rank 0 has the first word, if it lives; an outcome that is there already, and so is this start's, stays.
        """
        if rank:
            time.sleep(1.0)
        if self.config_file.exists() and not (self.path / OUTCOME_FILE).exists():
            write_outcome(self.path, Outcome(exit_code=1, update=self.newest_update(), error=error[:500], attempt=slurm_attempt()))

    def outcome(self) -> Outcome | None:
        """Return how the run ended last; None while it is under way, if it was killed, or if it never began."""
        return read_outcome(self.path)

    def newest_update(self) -> int:
        """Return the number of updates of the newest checkpoint by name (it may be damaged); 0 without one."""
        return newest_update(self.path)


def is_foreign(name: str) -> bool:
    """Say whether a file in a folder without a configuration is not one that a run makes before it has one."""
    return name not in LEFT_BY_A_CRASH and not name.startswith(TRIAL_PREFIX)


def default_run_dir(prompt: str) -> Path:
    """Return runs/<short safe name>: the prompt's words, and a hash where they were cut or changed."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    plain = words.replace("-", " ") == prompt.lower() and len(words) <= 40
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    return Path("runs") / (words if plain else f"{words[:40].strip('-')}-{digest}".strip("-"))
