"""`dist-vsd export`: a run's particles as files for other programs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from dist_vsd.commands.arguments import parse
from dist_vsd.config import nearest
from dist_vsd.runs.run_directory import split_stage
from dist_vsd.writable import require_writable_folder

if TYPE_CHECKING:
    from dist_vsd.runs.saved_run import SavedRun
    from dist_vsd.scaling.memory import Memory

FORMATS, KINDS = ("ply", "glb"), ("mesh", "points")

LEAST_RESOLUTION = 2
DESCRIPTION = """Write the particles of a run as PLY or GLB into RUN_DIR/export, on the GPU where there is one.

ply: in scene units, z up         glb: for browsers and viewers, upright as glTF has it
mesh:   the surface at --threshold by marching cubes, with a colour at each vertex
points: the centres of the surface's cells, with colours

Without --resolution each particle gets one that suits it: two cells for each detail that its grid and its training pictures can hold,
as far as points, memory and viewers allow; it is printed with its reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """What `export` takes."""

    run_dir: tyro.conf.Positional[str]
    """The run directory, or RUN_DIR@STAGE: as that stage has left its particles."""
    format: str = "ply"
    """ply, glb, or both as ply,glb."""
    kind: str = "mesh"
    """mesh or points."""
    particles: tuple[int, ...] = ()
    """Ids of the particles; all by default."""
    resolution: int = 0
    """Cells a side of the sampled cube; 0: as suits each particle."""
    threshold: float = 10.0
    """Density of the surface, 1 / scene units: light is halved in 0.07 units at 10."""
    out: str = ""
    """Folder for the files."""

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in FORMATS:
                listed = ", ".join(FORMATS)
                raise ValueError(f"--format must be one of {listed}, or several with commas, got {name!r}{nearest(name, FORMATS)}")
        if self.kind not in KINDS:
            raise ValueError(f"--kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.resolution and self.resolution < LEAST_RESOLUTION:
            raise ValueError(f"--resolution must be at least {LEAST_RESOLUTION}, got {self.resolution}: leave it out for one that suits")
        if not 0.0 < self.threshold < math.inf:
            raise ValueError(f"--threshold must be positive, got {self.threshold}")

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats to write, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.format.split(",")))


def run(arguments: list[str]) -> int:
    """Run the command; see cli.main for the exit codes."""
    parsed = parse(ExportArguments, arguments, "export", DESCRIPTION)
    folder = Path(parsed.out or Path(split_stage(Path(parsed.run_dir))[0], "export"))
    require_writable_folder(folder, f"--out {parsed.out!r}" if parsed.out else f"{str(folder)!r}", "choose another --out")

    from dist_vsd.device import best_device
    from dist_vsd.export.surface import VOLUME_BYTES
    from dist_vsd.runs.saved_run import open_run
    from dist_vsd.scaling.fit import SizeFlag
    from dist_vsd.scaling.memory import Memory, telling_out_of_memory

    device = best_device()
    memory = Memory.of(device)
    size = SizeFlag("--resolution", parsed.resolution, lambda cells: VOLUME_BYTES * cells**3)
    size.require_fit(memory)
    saved = open_run(Path(parsed.run_dir), parsed.particles, device)
    for note in saved.notes:
        print(note)
    if not saved.config.representation_row.is_volume:
        named = " and ".join(name.upper() for name in parsed.formats)
        raise ValueError(f"{saved.path} holds {saved.config.representation} particles, {named} needs radiance_field: use dist-vsd render")
    with telling_out_of_memory(memory, size.advice if parsed.resolution else lambda _memory: "give a lower --resolution"):
        for particle, theta in saved.particles.items():
            write(parsed, saved, particle, theta, folder, memory)
    return 0


def write(parsed: ExportArguments, saved: SavedRun, particle: int, theta: Any, folder: Path, memory: Memory) -> None:
    """Write one particle in all formats, and say what was written."""
    from dist_vsd.export.mesh_files import WRITERS
    from dist_vsd.export.resolution import suitable_resolution
    from dist_vsd.export.surface import surface_of

    cells = parsed.resolution
    if not cells:
        chosen = suitable_resolution(theta, saved.config, memory.free)
        cells = chosen.cells
        print(f"particle {particle}: --resolution {cells} ({chosen.why})", flush=True)
    surface = surface_of(theta, parsed.kind, cells, parsed.threshold)
    for name in parsed.formats:
        file = folder / f"{parsed.kind}_{particle:04d}.{name}"
        WRITERS[name](surface, file)
        print(f"  {file}  {len(surface.vertices):,} vertices", flush=True)
