"""`dist-vsd view`: look at a run's particles in the browser, while they train and after."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from pathlib import Path

import tyro

from dist_vsd.commands.arguments import parse

DESCRIPTION = """Look at the particles of a run in the browser, while they train and after.

Choose particle, checkpoint and channel (color, normal, depth, opacity), one particle or
several side by side, and turn them with the mouse. New checkpoints appear by themselves.
It reads the run's checkpoints, writes and locks nothing, and takes one CPU core at a low
priority. It listens on this machine alone, unless --host says otherwise. Ctrl+C ends it."""
NICENESS = 19  # whoever trains beside it goes first; the class of idle processes would not even end while all cores are busy


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewArguments:
    """What `view` takes."""

    run_dir: tyro.conf.Positional[str]
    """The run directory."""
    particle: int = 0
    """Id of the particle to begin with."""
    host: str = "127.0.0.1"
    """Address to listen on; whoever reaches it sees the particles, so other machines do with 0.0.0.0."""
    port: int = 8080
    """Port to listen on; 0 for any that is free."""
    size: int = 192
    """Height of the picture to begin with, pixels."""
    for_seconds: float = 0.0
    """End after so many seconds; 0: when Ctrl+C is pressed."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port must be in [0, 65535], got {self.port}: change it")
        if not 32 <= self.size <= 512:
            raise ValueError(f"--size must be in [32, 512], got {self.size}: change it")
        if not 0 <= self.for_seconds < math.inf:
            raise ValueError(f"--for-seconds must be 0 or more, got {self.for_seconds}: change it")


def run(arguments: list[str]) -> int:
    """Run the command; see cli.main for the exit codes."""
    parsed = parse(ViewArguments, arguments, "view", DESCRIPTION)
    if importlib.util.find_spec("viser") is None:
        raise ValueError("view needs viser, which is not installed: pip install 'dist_vsd[view]'")

    import torch

    from dist_vsd.viewing.server import serving, watch
    from dist_vsd.viewing.shelf import Shelf

    torch.set_num_threads(1)
    shelf = Shelf(Path(parsed.run_dir))
    shelf.take(parsed.particle, None)  # it has something to show
    os.nice(NICENESS)
    try:
        with serving(shelf, parsed.host, parsed.port, parsed.size, parsed.particle) as (address, painter):
            print(f"{parsed.run_dir} is shown at {address} (Ctrl+C ends it)", flush=True)
            watch(shelf, painter, parsed.for_seconds)
    except KeyboardInterrupt:
        print("ended")
    return 0
