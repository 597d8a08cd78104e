"""`dist-vsd render`: pictures of a run's particles."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from dist_vsd.commands.arguments import parse
from dist_vsd.particles.representations import CHANNELS
from dist_vsd.runs.run_directory import output_folder
from dist_vsd.writable import require_writable_folder

if TYPE_CHECKING:
    from dist_vsd.cameras import Cameras
    from dist_vsd.runs.saved_run import SavedRun
    from dist_vsd.scaling.fit import SizeFlag

KINDS = ("turntable", "grid", "views")
PIXEL_BYTES = 12  # three colours, fp32
DESCRIPTION = """Render the particles of a run from any cameras.

turntable: one turn of each particle as GIF, MP4 and a PNG strip
grid:      one PNG, a row for each particle, a column for each of --num-views azimuths
views:     one PNG for each particle and each --azimuth-deg

2D particles look the same from everywhere: each kind writes their pictures.

Files go to RUN_DIR/export (turntable) and RUN_DIR/renders (grid, views) unless --out says otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderArguments:
    """What `render` takes."""

    run_dir: tyro.conf.Positional[str]
    """The run directory, or RUN_DIR@STAGE: as that stage has left its particles."""
    kind: str = "turntable"
    """turntable, grid or views."""
    channel: str = "color"
    """color, normal, depth or opacity, as far as the particles show them."""
    particles: tuple[int, ...] = ()
    """Ids of the particles; all by default."""
    num_views: int = 0
    """Frames of a turntable (40 by default) or columns of a grid (8 by default)."""
    azimuth_deg: tuple[float, ...] = (0.0, 90.0, 180.0, 270.0)
    """Azimuths of `views`, degrees; 0 looks at the front."""
    elevation_deg: float = 15.0
    """Elevation of all cameras, degrees."""
    distance: float | None = None
    """Distance to the origin, scene units; by default the middle of the training cameras'."""
    fov_deg: float | None = None
    """Vertical field of view, degrees; by default the middle of the training cameras'."""
    size: int = 128
    """Height and width, pixels."""
    out: str = ""
    """Folder for the files."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"--kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.channel not in CHANNELS:
            raise ValueError(f"--channel must be one of {', '.join(CHANNELS)}, got {self.channel!r}")
        if self.size < 1:
            raise ValueError(f"--size must be at least 1, got {self.size}")
        if self.num_views < 0:
            raise ValueError(f"--num-views must be at least 1, got {self.num_views}")
        if not -90 <= self.elevation_deg <= 90:
            raise ValueError(f"--elevation-deg must be in [-90, 90], got {self.elevation_deg}")
        if self.distance is not None and not 0.0 < self.distance < math.inf:
            raise ValueError(f"--distance must be above 0, got {self.distance}: change it, or leave it out")
        if self.fov_deg is not None and not 0.0 < self.fov_deg < 180.0:
            raise ValueError(f"--fov-deg must be above 0 and below 180, got {self.fov_deg}: change it, or leave it out")
        if not self.azimuth_deg or not all(map(math.isfinite, self.azimuth_deg)):
            raise ValueError(f"--azimuth-deg must be one or more numbers, got {' '.join(map(str, self.azimuth_deg)) or 'none'}")


def run(arguments: list[str]) -> int:
    """Run the command; see cli.main for the exit codes."""
    parsed = parse(RenderArguments, arguments, "render", DESCRIPTION)
    folder = Path(parsed.out or output_folder(parsed.run_dir, "export" if parsed.kind == "turntable" else "renders"))
    require_writable_folder(folder, f"--out {parsed.out!r}" if parsed.out else f"{str(folder)!r}", "choose another --out")

    from dist_vsd.device import best_device
    from dist_vsd.runs.saved_run import open_run
    from dist_vsd.scaling.memory import Memory, telling_out_of_memory

    device = best_device()
    memory = Memory.of(device)
    saved = open_run(Path(parsed.run_dir), parsed.particles, device)
    if parsed.channel not in (shows := saved.config.representation_row.shows):
        raise ValueError(f"--channel must be {' or '.join(shows)} for representation {saved.config.representation}, got {parsed.channel!r}")
    for note in saved.notes:
        print(note)
    cameras = choose_cameras(parsed, saved).to(device)
    if saved.config.is_flat:
        cameras = cameras[:1]  # they are the same from everywhere
    size = size_flag(parsed, saved, len(cameras))
    size.require_fit(memory)
    with telling_out_of_memory(memory, size.advice):
        files = write_pictures(parsed, saved, cameras, folder)
    print(f"update {saved.update} of {saved.path}:")
    for file in files:
        print(f"  {file}")
    return 0


def size_flag(parsed: RenderArguments, saved: SavedRun, num_views: int) -> SizeFlag:
    """Return what decides the memory: one render's way, and the pictures of a particle (of all of them in a grid) thrice."""
    from dist_vsd.scaling.fit import SizeFlag, measure_render

    held = measure_render(next(iter(saved.particles.values())), saved.config, False, parsed.channel)
    pictures = 3 * PIXEL_BYTES * num_views * (len(saved.particles) if parsed.kind == "grid" else 1)
    return SizeFlag("--size", parsed.size, lambda size: held.at(size) + pictures * size**2)


def write_pictures(parsed: RenderArguments, saved: SavedRun, cameras: Cameras, folder: Path) -> list[Path]:
    """Render the particles and write what --kind says; return the files."""
    from dist_vsd.export.turntable import render_views, write_grid, write_turntable
    from dist_vsd.image_files import write_png

    files: list[Path] = []
    rows = []
    ending = "" if parsed.channel == "color" else f"_{parsed.channel}"
    for particle, theta in saved.particles.items():
        frames = render_views(theta, cameras, parsed.size, saved.decode, parsed.channel)
        if saved.config.is_flat:
            files.append(folder / f"picture_{particle:04d}.png")
            write_png(frames, files[-1])
        elif parsed.kind == "turntable":
            files += write_turntable(frames, folder / f"turntable_{particle:04d}{ending}")
        elif parsed.kind == "grid":
            rows.append(frames)
        else:
            for azimuth, frame in zip(parsed.azimuth_deg, frames, strict=True):
                file = folder / f"particle_{particle:04d}_azimuth_{azimuth:+08.2f}{ending}.png"
                write_png(frame[None], file)
                files.append(file)
    if rows:
        files.append(write_grid(rows, folder / f"grid_update_{saved.update:08d}{ending}.png"))
    return files


def choose_cameras(parsed: RenderArguments, saved: SavedRun) -> Cameras:
    """Return the cameras that the arguments ask for, by default at the middle of those of training."""
    import torch

    from dist_vsd.cameras import look_at_origin, turntable

    camera = saved.config.camera
    distance = parsed.distance if parsed.distance is not None else sum(camera.distance) / 2
    fov_deg = parsed.fov_deg if parsed.fov_deg is not None else sum(camera.fov_deg) / 2
    if parsed.kind == "views":
        azimuth = torch.tensor(parsed.azimuth_deg)
        ones = torch.ones_like(azimuth)
        return look_at_origin(azimuth, parsed.elevation_deg * ones, distance * ones, fov_deg * ones)
    num_views = parsed.num_views or (40 if parsed.kind == "turntable" else 8)
    return turntable(num_views, parsed.elevation_deg, distance, fov_deg)
