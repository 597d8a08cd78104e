"""Records a run with wandb, in a process of its own that follows the run's metrics.jsonl.

    python -m dist_vsd.reporting.wandb_follower      started by reporting/wandb_reporter.py, never by hand

The run itself never calls wandb, so no error, hang or slow network of wandb's can stop or delay it. This process is told what to
do by a line of JSON (Recording) on its standard input and the run's exit code by a second one; without the latter the run was
killed. It answers with one line at most: what went wrong first.

Each update goes into wandb once. Updates that wandb holds already (a resumed run repeats those after its checkpoint) are passed
over; those that it lost (killed before it wrote them) are in metrics.jsonl and are made up for. What it holds is asked of the
server online, and of the .wandb files offline, which `wandb sync` joins in the order of their starts.
"""

from __future__ import annotations

import configparser
import contextlib
import dataclasses
import fcntl
import json
import netrc
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dist_vsd.reporting.wandb_records import last_recorded_update

if TYPE_CHECKING:
    import wandb

DEFAULT_HOST = "api.wandb.ai"
INIT_SECONDS, FINISH_SECONDS = 20.0, 30.0
LOCK_SECONDS = 60.0
POLL_SECONDS = 0.5
DONE, STOPPED = 0, 75  # of cli.py's exit codes
MOST_PARTICLES_SHOWN = 32
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recording:
    """What a run wants recorded.

    Attributes:
        run_dir: the run directory; wandb's own files go into its folder wandb/.
        mode: "online" or "offline".
        run_id: wandb's id of the run, the same in all its starts.
        project, entity, group, name: of the run; None leaves it to wandb's environment variables.
        tags: of the run.
        config: the resolved configuration.
        pid: of the process whose CPU and memory wandb watches.
    """

    run_dir: str
    mode: str
    run_id: str
    project: str | None
    entity: str | None
    group: str | None
    name: str | None
    tags: list[str]
    config: dict[str, Any]
    pid: int


def resolve_mode(mode: str, environment: Mapping[str, str], has_key: Callable[[Mapping[str, str]], bool]) -> str:
    """Return online, offline or disabled.

    Args:
        mode: of the configuration: one of these, or "auto".
        environment: its WANDB_MODE decides where the mode is "auto".
        has_key: whether a key is configured, asked last.
    """
    if mode != "auto":
        return mode
    asked = {"dryrun": "offline", "run": "online"}.get(environment.get("WANDB_MODE", ""), environment.get("WANDB_MODE", ""))
    if asked in ("online", "offline", "disabled"):
        return asked
    return "online" if has_key(environment) else "offline"


def has_key(environment: Mapping[str, str]) -> bool:
    """Say whether wandb would find credentials without asking: in its variables, or in a netrc file for its host."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    home = Path(environment.get("HOME", "~")).expanduser()
    host = urlsplit(environment.get("WANDB_BASE_URL") or _base_url_of_settings(environment, home)).netloc or DEFAULT_HOST
    files = [Path(environment["NETRC"])] if environment.get("NETRC") else [home / ".netrc", home / "_netrc"]
    for file in files:
        with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            _, _, password = netrc.netrc(str(file)).authenticators(host) or ("", "", "")
            if password:
                return True
    return False


def _base_url_of_settings(environment: Mapping[str, str], home: Path) -> str:
    """Return the server that `wandb login --host` wrote down; empty without one."""
    settings = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
        settings.read(Path(environment.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb") / "settings")
    return settings.get("default", "base_url", fallback="")


def open_run(recording: Recording, tell: Callable[[str], None]) -> tuple[wandb.Run, int]:
    """Begin, or go on with, the run in wandb.

    Args:
        recording: of the run.
        tell: takes what went wrong.

    Returns:
        The run, and the greatest update that it holds already, -1 without any.
    """
    import wandb

    if recording.mode == "online":
        try:
            run = _init(recording, "online")
            return run, run.step - 1
        except Exception as error:  # of a dozen kinds: no network, a wrong key, a server's refusal
            wandb.teardown()  # else its service refuses the same run a second time
            folder = Path(recording.run_dir) / "wandb"
            tell(f"wandb can't go online ({_one_line(error)}): recorded offline, upload it later with wandb sync {folder}/offline-run-*")
    held = last_recorded_update(Path(recording.run_dir) / "wandb")
    return _init(recording, "offline"), held


def _init(recording: Recording, mode: str) -> wandb.Run:
    import wandb

    settings = wandb.Settings(
        init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, x_stats_pid=recording.pid,
        console="off", silent=True, save_code=False, disable_code=True, disable_git=True,
    )  # fmt: skip
    run = wandb.init(
        dir=recording.run_dir, mode=mode, id=recording.run_id, resume="allow", settings=settings, config=recording.config,
        project=recording.project, entity=recording.entity, group=recording.group, name=recording.name, tags=recording.tags,
    )  # fmt: skip
    run.define_metric("update")
    run.define_metric("*", step_metric="update")
    return run


def follow(file: Path, is_over: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """Yield the lines of a JSON-lines file as they are written, and those that are left when it is over."""
    rest = ""
    with open(file, encoding="utf-8", errors="replace") as opened:
        while True:
            over = is_over()  # asked before the last reading, so that nothing is missed
            *lines, rest = (rest + opened.read()).split("\n")
            for line in lines:
                with contextlib.suppress(ValueError):
                    yield json.loads(line)
            if over:
                return


def row_of(line: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Return what wandb shall log of a line of metrics.jsonl: figures, or pictures, videos and meshes; nothing of an event."""
    if "event" in line:
        return {}
    if "media" in line:
        media = {name: _as_media([run_dir / file for file in files]) for name, files in line["media"].items()}
        return {"update": line["update"], **{name: value for name, value in media.items() if value}}
    return {name: value for name, value in line.items() if value is not None}


def _as_media(files: list[Path]) -> Any:
    """Return files of one kind as wandb's media; pictures, one a shard, below one another as one."""
    import wandb

    files = [file for file in files if file.is_file()][:MOST_PARTICLES_SHOWN]
    if not files:
        return None
    if files[0].suffix == ".png":
        return wandb.Image(_stacked(files))
    if files[0].suffix == ".mp4":
        return [wandb.Video(str(file), format="mp4", caption=file.stem) for file in files]
    return [wandb.Object3D.from_file(str(file)) for file in files]


def _stacked(files: list[Path]) -> Any:
    from PIL import Image

    pictures = [Image.open(file).convert("RGB") for file in files]
    whole = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)))
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole


def record(recording: Recording, orders: Orders, tell: Callable[[str], None]) -> None:
    """Record a run from its present state to its end."""
    run_dir = Path(recording.run_dir)
    run, held = open_run(recording, tell)
    for line in follow(run_dir / "metrics.jsonl", orders.has_ended):
        try:
            row = row_of(line, run_dir) if line["update"] > held else {}
            if row:
                run.log(row, step=line["update"])
        except ConnectionError:  # its service has died, and with it the run as wandb knows it
            raise
        except Exception as error:  # one row that wandb can't take does not cost the others
            tell(f"wandb can't take a row of update {line.get('update')} ({_one_line(error)}): it is left out, metrics.jsonl holds it")
    if orders.exit_code == DONE:
        run.log_artifact(_config_artifact(recording))
    if orders.exit_code == STOPPED:
        run.mark_preempting()
    run.finish(exit_code=orders.exit_code)


def restart(recording: Recording, orders: Orders, tell: Callable[[str], None]) -> None:
    """Record anew with another service, which takes what the one before it left out."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()
    record(recording, orders, tell)


def _config_artifact(recording: Recording) -> wandb.Artifact:
    import wandb

    artifact = wandb.Artifact(f"config-{recording.run_id}", type="config")
    artifact.add_file(str(Path(recording.run_dir) / "config.yaml"))
    return artifact


class Orders:
    """The two lines of standard input, read without a buffer that would hide the second from select().

    Attributes:
        exit_code: of the run; 1 until it is known, and for a run that was killed.
    """

    def __init__(self, file: int = 0) -> None:
        self.exit_code = 1
        self._file, self._text, self._is_open = file, b"", True

    def recording(self) -> Recording:
        """Wait for the first line, and return what it holds."""
        while self._is_open and b"\n" not in self._text:
            self._read()
        line, _, self._text = self._text.partition(b"\n")
        return Recording(**json.loads(line))

    def has_ended(self) -> bool:
        """Say whether the run has ended, after POLL_SECONDS at most."""
        if b"\n" not in self._text and select.select([self._file], [], [], POLL_SECONDS)[0]:
            self._read()
        if b"\n" in self._text:
            self.exit_code = int(self._text)
            return True
        return not self._is_open

    def _read(self) -> None:
        text = os.read(self._file, 1 << 16)
        self._text, self._is_open = self._text + text, bool(text)


class Telling:
    """Writes the first trouble to standard output, where the run reads it; later ones mostly follow from it."""

    def __init__(self) -> None:
        self.has_told = False

    def __call__(self, text: str) -> None:
        """Tell a trouble, in one line."""
        if not self.has_told:
            self.has_told = True
            with contextlib.suppress(OSError):  # the run is gone
                print(text, flush=True)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no earlier start of the run records any more: what it leaves behind decides what is left to record."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        until = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(POLL_SECONDS)
        yield


def main() -> None:
    """Do what standard input asks for."""
    # The run decides when it ends; a launcher or Slurm may signal every process of the job. wandb's service inherits the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    tell = Telling()
    try:
        orders = Orders()
        recording = orders.recording()
        with alone(Path(recording.run_dir) / "wandb"):
            try:
                record(recording, orders, tell)
            except Exception:  # Slurm signals every process of a job, and wandb's service does not outlive that
                restart(recording, orders, tell)
    except Exception as error:
        tell(f"wandb gave up ({_one_line(error)}): the run goes on, metrics.jsonl holds what it logs")
    sys.stdout.flush()
    os._exit(0)  # wandb's hooks at the end of the interpreter may wait for its server


if __name__ == "__main__":
    main()
