"""What `dist-vsd view` costs the run that it watches: a run's updates with and without a viewer beside it, by turns.

    python benchmarks/view_beside_run.py                             writes benchmarks/results/view_beside_run.json
    python benchmarks/view_beside_run.py --rounds 1 --out /tmp/view.json      a look at whether it works

One run of the embedded preset goes on; `dist-vsd view` of it is open in another process. Blocks of 16 updates, between two refreshes of the
occupancy grids and with one checkpoint each, take turns:

    alone    the viewer is stopped (SIGSTOP): it takes no time at all
    open     it is open with one client whose camera rests; it shows each new checkpoint
    moving   the client's camera goes around, 30 times a second, so that the viewer renders all the time

A ratio is of blocks of one round, so that what else the machine does hits both. The client speaks viser's protocol and draws nothing: a
browser of this machine would take time of its own, one on another machine takes none.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402 - of viser, as the next two
import torch  # noqa: E402
import viser  # noqa: E402
import websockets.sync.client  # noqa: E402
import zstandard  # noqa: E402
from scipy.spatial.transform import Rotation  # noqa: E402

from dist_vsd.cameras import look_at_origin  # noqa: E402
from dist_vsd.config_files import load_preset  # noqa: E402
from dist_vsd.scaling.machine import Places, commit_of_package, describe_machine  # noqa: E402

ALONE, OPEN, MOVING = STATES = ("alone", "open", "moving")
BLOCK = 16  # updates
NUM_WARMUP = 48  # networks are recorded after 30 passes of one shape
MOVES_PER_SECOND, DEGREES_A_MOVE = 30.0, 3.0
PICTURE = b"BackgroundImageMessage"
SIZE = (720, 1280)  # of the browser's window, pixels


def camera_message(azimuth_deg: float) -> bytes:
    """Return what viser's page says of a camera that goes around the object."""
    camera = load_preset("embedded").camera
    values = (azimuth_deg, 15.0, sum(camera.distance) / 2, sum(camera.fov_deg) / 2)
    one = look_at_origin(*(torch.tensor([value], dtype=torch.float64) for value in values))
    rotation = one.c2w[0, :3, :3].numpy() * [1.0, -1.0, -1.0]  # OpenCV: y down, looking along z
    x, y, z, w = Rotation.from_matrix(rotation).as_quat().tolist()
    message = {
        "type": "ViewerCameraMessage", "wxyz": [w, x, y, z], "position": one.c2w[0, :3, 3].tolist(), "fov": float(one.fov),
        "near": 0.1, "far": 100.0, "image_height": SIZE[0], "image_width": SIZE[1], "look_at": [0.0] * 3, "up_direction": [0.0, 0.0, 1.0],
    }  # fmt: skip
    return msgspec.msgpack.encode(message)


class Client:
    """A tab that looks, and moves when it is told to.

    Args:
        address: of the viewer.
    """

    def __init__(self, address: str) -> None:
        protocols = [websockets.Subprotocol(f"viser-v{viser.__version__}")]
        where = address.replace("http", "ws")
        self._socket = websockets.sync.client.connect(where, subprotocols=protocols, max_size=None, ping_timeout=None)
        self.num_pictures, self.moves = 0, threading.Event()
        self._socket.send(camera_message(0.0))
        for work in (self._receive, self._move):
            threading.Thread(target=self._until_closed, args=(work,), daemon=True).start()

    def _until_closed(self, work: Callable[[], None]) -> None:
        with contextlib.suppress(websockets.ConnectionClosed):  # the viewer is killed in the end
            work()

    def _receive(self) -> None:
        """Count the pictures that arrive."""
        for message in self._socket:
            length = int.from_bytes(message[8:16], "little")
            self.num_pictures += PICTURE in zstandard.ZstdDecompressor().decompress(message[16 : 16 + length])

    def _move(self) -> None:
        """Go around for as long as ``moves`` is set."""
        for number in itertools.count(1):
            self.moves.wait()
            self._socket.send(camera_message(DEGREES_A_MOVE * number % 360))
            time.sleep(1 / MOVES_PER_SECOND)


class Run:
    """A run that trains until it is ended.

    Args:
        folder: of the run.
        environment: variables.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        words = ["a green duck", "--num-particles", "1", "--num-updates", "100000", "--log-every", "1", "--preview-every", "100000"]
        words += ["--checkpoint-every", str(BLOCK), "--no-turntables", "--wandb.mode", "disabled", "--run-dir", str(folder)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dist_vsd", "train", *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._file = folder / "metrics.jsonl"
        self._updates = self._follow()

    def _follow(self) -> Iterator[dict[str, float]]:
        """Yield the figures of each update as it is logged."""
        while not self._file.exists():
            self._wait()
        text = ""
        with self._file.open() as file:
            while True:
                text += file.read()
                *lines, text = text.split("\n")
                yield from (values for values in map(json.loads, lines) if "seconds/update" in values)
                self._wait()

    def _wait(self) -> None:
        if self._process.poll() is not None:
            raise SystemExit(f"the run ended with {self._process.returncode}")
        time.sleep(0.02)

    def seconds(self, num_updates: int) -> list[float]:
        """Wait for so many updates; return the seconds of each, by the clock."""
        return [values["seconds/update"] for values in itertools.islice(self._updates, num_updates)]

    def end(self) -> None:
        """End it, saved or not."""
        self._process.kill()
        self._process.wait()


def start_viewer(folder: Path, environment: dict[str, str]) -> tuple[subprocess.Popen[str], str]:
    """Start `dist-vsd view`; return its process and address."""
    command = [sys.executable, "-m", "dist_vsd", "view", str(folder), "--port", "0"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    return process, line.split(" is shown at ")[1].split()[0]


def measure(folder: Path, num_rounds: int, num_threads: int) -> dict[str, Any]:
    """Let the states take turns; return what is written."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1"}
    run, viewer = Run(folder, environment), None
    found: dict[str, list[float]] = {state: [] for state in STATES}
    pictures: dict[str, list[float]] = {state: [] for state in STATES}
    try:
        run.seconds(NUM_WARMUP)
        viewer, address = start_viewer(folder, environment)
        client = Client(address)
        time.sleep(5.0)  # its first pictures
        for number in range(num_rounds):
            for state in STATES if number % 2 == 0 else reversed(STATES):
                viewer.send_signal(signal.SIGSTOP if state == ALONE else signal.SIGCONT)
                (client.moves.set if state == MOVING else client.moves.clear)()
                run.seconds(2)  # of which the first had begun before
                before = client.num_pictures
                seconds = run.seconds(BLOCK)
                found[state].append(statistics.fmean(seconds))
                pictures[state].append((client.num_pictures - before) / sum(seconds))
                told = f"{found[state][-1]:.3f} s an update, {pictures[state][-1]:.1f} pictures/s"
                print(f"{number + 1}/{num_rounds}  {state:7}  {told}", flush=True)
    finally:
        if viewer is not None:
            viewer.kill()
            viewer.wait()
        run.end()
    rows = {
        state: {
            "seconds_an_update": statistics.median(found[state]),
            "pictures_a_second": statistics.median(pictures[state]),
            **({} if state == ALONE else {"ratio_to_alone": ratios(found[state], found[ALONE])}),
            "blocks": found[state],
        }
        for state in STATES
    }
    return {"rounds": num_rounds, "updates_a_block": BLOCK, "threads": num_threads, "states": rows}


def ratios(these: list[float], those: list[float]) -> dict[str, float]:
    """Return median, least and greatest ratio of blocks of one round."""
    found = [one / other for one, other in zip(these, those, strict=True)]
    return {"median": statistics.median(found), "least": min(found), "greatest": max(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="blocks of each state")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the run")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "view_beside_run.json")
    words = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that neither process stays behind
    head = {"commit": commit_of_package(), "machine": describe_machine(Places.of_this_machine(0)), "torch": torch.__version__}
    load = os.getloadavg()[0]  # of what else the machine does
    with tempfile.TemporaryDirectory() as folder:
        record = measure(Path(folder) / "run", words.rounds, words.threads)
    words.out.write_text(json.dumps({**head, "load_before": load, **record}, indent=1) + "\n")
    print(words.out)


if __name__ == "__main__":
    main()
