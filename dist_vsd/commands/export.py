"""`dist-vsd export`: a run's particles as files for other programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from dist_vsd.commands.arguments import parse
from dist_vsd.writable import require_writable_folder

DESCRIPTION = """Write the particles of a run as PLY into RUN_DIR/export.

mesh:   the surface at --threshold by marching cubes, with a colour at each vertex
points: the centres of the surface's cells, with colours"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """What `export` takes."""

    run_dir: tyro.conf.Positional[str]
    """The run directory."""
    format: str = "ply"
    """ply."""
    kind: str = "mesh"
    """mesh or points."""
    particles: tuple[int, ...] = ()
    """Ids of the particles; all by default."""
    resolution: int = 96
    """Cells a side of the sampled cube."""
    threshold: float = 10.0
    """Density of the surface, 1 / scene units: light is halved in 0.07 units at 10."""
    out: str = ""
    """Folder for the files."""

    def __post_init__(self) -> None:
        for name, choices in (("format", ("ply",)), ("kind", ("mesh", "points"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.resolution < 2:
            raise ValueError(f"--resolution must be at least 2, got {self.resolution}")
        if self.threshold <= 0:
            raise ValueError(f"--threshold must be positive, got {self.threshold}")


def run(arguments: list[str]) -> int:
    """Run the command; see cli.main for the exit codes."""
    parsed = parse(ExportArguments, arguments, "export", DESCRIPTION)
    folder = Path(parsed.out or Path(parsed.run_dir, "export"))
    require_writable_folder(folder, f"--out {parsed.out!r}" if parsed.out else f"{str(folder)!r}", "choose another --out")

    from dist_vsd.export.ply import write_ply
    from dist_vsd.runs.saved_run import open_run

    saved = open_run(Path(parsed.run_dir), parsed.particles)
    for note in saved.notes:
        print(note)
    if not saved.config.representation_row.is_volume:
        raise ValueError(f"{saved.path} holds {saved.config.representation} particles, PLY needs radiance_field: use dist-vsd render")
    for particle, theta in saved.particles.items():
        file = folder / f"{parsed.kind}_{particle:04d}.ply"
        count = write_ply(theta, file, parsed.kind, parsed.resolution, parsed.threshold)
        print(f"  {file}  {count:,} vertices")
    return 0
