"""`dist-vsd export`: a run's particles as files for other programs."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from dist_vsd.commands.arguments import parse
from dist_vsd.config import nearest
from dist_vsd.particles.representations import REPRESENTATIONS
from dist_vsd.runs.run_directory import output_folder
from dist_vsd.writable import require_writable_folder

if TYPE_CHECKING:
    from dist_vsd.export.mesh import Mesh
    from dist_vsd.priors.clip import ClipScorer
    from dist_vsd.runs.saved_run import SavedRun
    from dist_vsd.scaling.memory import Memory

MESH_FORMATS, PICTURE_FORMATS, KINDS = ("glb", "obj", "ply"), ("mp4", "gif", "png"), ("mesh", "points")
FORMATS = (*MESH_FORMATS, *PICTURE_FORMATS)
POINT_FORMATS = ("glb", "ply")
LEAST_RESOLUTION, LEAST_FACES = 2, 4
TEXTURE_SIZES = (512, 4096)
DESCRIPTION = """Write the particles of a run as files for other programs into RUN_DIR/export, on the GPU where there is one.

glb: for browsers and viewers, with a texture; upright, in metres        obj: with a texture and its MTL, upright
ply: with a colour at each vertex, in scene units, z up                  mp4, gif, png: a turn of the particle itself

mesh:   the surface at --threshold by marching cubes; its report is printed and stands beside it as mesh_0000.json
points: the centres of the surface's cells, of a mesh its vertices, with colours, as glb or ply

Without --resolution and --threshold each field gets those that suit it: two cells for each detail that its grid and its training
pictures can hold, as far as points, memory and viewers allow; the density at which the surface has its silhouettes. They are printed.
A mesh particle is its surface already, and one that began from a file and was only painted keeps its faces and its texture's layout."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """What `export` takes."""

    run_dir: tyro.conf.Positional[str]
    """The run directory, or RUN_DIR@STAGE: as that stage has left its particles."""
    format: str = "ply"
    """Out of glb, obj, ply, mp4, gif and png; several with commas: glb,mp4."""
    kind: str = "mesh"
    """mesh or points, of glb, obj and ply."""
    particles: tuple[int, ...] = ()
    """Ids of the particles; all by default."""
    resolution: int = 0
    """Cells a side of the sampled cube; 0: as suits each field."""
    threshold: float = 0.0
    """Density of the surface, 1 / scene units: light is halved in 0.07 units at 10. 0: as suits each field."""
    texture_size: int = 1024
    """Height and width of the texture of glb and obj, texels, 512 to 4096; 0: colours at vertices, the quick way."""
    max_faces: int = 0
    """Faces of a mesh at the most, or about; 0: 50,000 with a texture, all without, and all of a mesh that was only painted."""
    keep_fragments: bool = False
    """Keep parts far smaller than the greatest, and the walls of hollows inside."""
    out: str = ""
    """Folder for the files."""

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in FORMATS:
                listed = ", ".join(FORMATS)
                raise ValueError(f"--format must be one of {listed}, or several with commas, got {name!r}{nearest(name, FORMATS)}")
        if self.kind not in KINDS:
            raise ValueError(f"--kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "points" and (others := [name for name in self.mesh_formats if name not in POINT_FORMATS]):
            raise ValueError(f"--kind points needs --format {' or '.join(POINT_FORMATS)}, got {others[0]}: change either")
        if self.resolution and self.resolution < LEAST_RESOLUTION:
            raise ValueError(f"--resolution must be at least {LEAST_RESOLUTION}, got {self.resolution}: leave it out for one that suits")
        if not 0.0 <= self.threshold < math.inf:
            raise ValueError(f"--threshold must be positive, or 0 for the one that suits, got {self.threshold}")
        least, most = TEXTURE_SIZES
        if self.texture_size and not least <= self.texture_size <= most:
            raise ValueError(f"--texture-size must be {least} to {most}, or 0 for colours at vertices, got {self.texture_size}")
        if self.max_faces and self.max_faces < LEAST_FACES:
            raise ValueError(f"--max-faces must be at least {LEAST_FACES}, or 0 for as many as suit, got {self.max_faces}")

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats to write, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.format.split(",")))

    @property
    def mesh_formats(self) -> tuple[str, ...]:
        """Those of the surface."""
        return tuple(name for name in self.formats if name in MESH_FORMATS)

    @property
    def has_texture(self) -> bool:
        """Whether one is wanted: PLY has none."""
        return bool(self.texture_size) and self.kind == "mesh" and self.mesh_formats not in ((), ("ply",))


def run(arguments: list[str]) -> int:
    """Run the command; see cli.main for the exit codes."""
    parsed = parse(ExportArguments, arguments, "export", DESCRIPTION)
    folder = Path(parsed.out or output_folder(parsed.run_dir, "export"))
    require_writable_folder(folder, f"--out {parsed.out!r}" if parsed.out else f"{str(folder)!r}", "choose another --out")

    from dist_vsd.device import best_device
    from dist_vsd.particles.iso_level import VOLUME_BYTES
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
    require_shape(parsed, saved)
    with telling_out_of_memory(memory, size.advice if parsed.resolution else lambda _memory: "give a lower --resolution"):
        if parsed.mesh_formats:
            write_shapes(parsed, saved, folder, memory)
        write_pictures(parsed, saved, folder)
    return 0


def require_shape(parsed: ExportArguments, saved: SavedRun) -> None:
    """Refuse formats that the run's particles can't have, flags that say nothing of them, and a texture without what it takes.

    Raises:
        ValueError: see above.
    """
    row, kind = saved.config.representation_row, saved.config.representation
    refused = [] if row.is_solid else list(parsed.mesh_formats)
    refused += [name for name in ("mp4", "gif") if name in parsed.formats and row.is_flat]
    if refused:
        named = " and ".join(name.upper() for name in refused)
        served = " or ".join(name for name, other in REPRESENTATIONS.items() if other.is_solid)
        raise ValueError(f"{saved.path} holds {kind} particles, {named} needs {served}: use dist-vsd render, or --format png")
    if row.has_surface and (flags := [f"--{name}" for name in ("resolution", "threshold") if getattr(parsed, name)]):
        raise ValueError(f"{saved.path} holds {kind} particles, {flags[0]} is for the surface of a field: leave it out")
    if parsed.has_texture:
        from dist_vsd.export.atlas import require_xatlas

        require_xatlas()


def write_shapes(parsed: ExportArguments, saved: SavedRun, folder: Path, memory: Memory) -> None:
    """Write the surface of each particle; all are found before the first is written, as one of them may have none."""
    from dist_vsd.export.mesh import MeshOptions, make_mesh
    from dist_vsd.export.mesh_files import WRITERS, write_points
    from dist_vsd.export.mesh_report import in_words

    found = {particle: find(parsed, saved, particle, memory) for particle in saved.particles}
    scorer = clip_of(saved) if parsed.kind == "mesh" else None
    options = MeshOptions(
        texture_size=parsed.texture_size if parsed.has_texture else 0, max_faces=parsed.max_faces, keep_fragments=parsed.keep_fragments
    )
    for particle, (shape, settings) in found.items():
        files = [folder / f"{parsed.kind}_{particle:04d}.{name}" for name in parsed.mesh_formats]
        if parsed.kind == "points":
            points, colors = shape
            for file in files:
                write_points(points, colors, file)
                print(f"  {file}  {len(points):,} points", flush=True)
            continue
        mesh = make_mesh(shape, options)
        if mesh.note:
            print(f"particle {particle}: {mesh.note}", flush=True)
        written = [path for file in files for path in WRITERS[file.suffix[1:]](mesh, file)]
        report = write_report(saved, particle, mesh, settings, folder, scorer)
        for line in [*in_words(report), *map(str, written)]:
            print(f"  {line}", flush=True)


def find(parsed: ExportArguments, saved: SavedRun, particle: int, memory: Memory) -> tuple[Any, dict[str, Any]]:
    """Return a particle's surface, or its points and their colours, and what it was found by, which is printed.

    Raises:
        ValueError: it has no surface.
    """
    from dist_vsd.export.surface import own_surface

    if not saved.config.representation_row.has_surface:
        return find_in_field(parsed, saved, particle, memory)
    try:
        surface = own_surface(saved.particles[particle])
    except ValueError as error:
        raise ValueError(f"particle {particle} of {saved.path} has no surface: {error}") from error
    print(f"particle {particle}: {'the mesh that it began from' if surface.is_given else 'its own surface'}", flush=True)
    return (surface.vertices, surface.colors_at(surface.vertices)) if parsed.kind == "points" else surface, {}


def find_in_field(parsed: ExportArguments, saved: SavedRun, particle: int, memory: Memory) -> tuple[Any, dict[str, Any]]:
    """Do the same for a field.

    Raises:
        ValueError: it has no surface.
    """
    from dist_vsd.export.resolution import suitable_resolution
    from dist_vsd.export.surface import field_surface, surface_points
    from dist_vsd.particles.iso_level import density_volume, suitable_threshold

    theta, cells, threshold, words = saved.particles[particle], parsed.resolution, parsed.threshold, []
    if not cells:
        chosen = suitable_resolution(theta, saved.config, memory.free)
        cells = chosen.cells
        words.append(f"--resolution {cells} ({chosen.why})")
    volume = density_volume(theta, cells)
    try:
        if not threshold:
            threshold = suitable_threshold(theta, volume)
            words.append(f"--threshold {threshold:.3g} (at which its surface has its silhouettes)")
        shape = (surface_points if parsed.kind == "points" else field_surface)(theta, volume, threshold)
    except ValueError as error:
        raise ValueError(f"particle {particle} of {saved.path} has no surface: {error}") from error
    print(f"particle {particle}: {', '.join(words) or f'--resolution {cells} --threshold {threshold:g}'}", flush=True)
    return shape, {"resolution": cells, "threshold": threshold}


def clip_of(saved: SavedRun) -> ClipScorer | None:
    """Load the CLIP that the run names, or that lies beside its prior, if there is one."""
    from dist_vsd.priors.clip import ClipScorer
    from dist_vsd.priors.clip_folder import clip_for

    folder = clip_for(saved.config.prior, saved.config.evaluate_clip)
    return ClipScorer.load(folder, next(next(iter(saved.particles.values())).parameters()).device) if folder else None


def write_report(
    saved: SavedRun, particle: int, mesh: Mesh, settings: dict[str, Any], folder: Path, scorer: ClipScorer | None
) -> dict[str, Any]:
    """Write what a mesh is like, and what was lost to it, beside it; return it."""
    from dist_vsd.export.mesh_report import describe, what_was_lost

    config = saved.config
    lost = what_was_lost(mesh, saved.particles[particle], config.camera, config.render_size, scorer, config.prompt)
    report = {"particle": particle, "update": saved.update, "prompt": config.prompt, **settings, **describe(mesh), "lost": lost}
    (folder / f"mesh_{particle:04d}.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def write_pictures(parsed: ExportArguments, saved: SavedRun, folder: Path) -> None:
    """Write a turn of each particle in the formats of pictures, as `train` does at its end."""
    from dist_vsd.export.turntable import write_turn

    kinds = [name for name in parsed.formats if name in PICTURE_FORMATS]
    for particle, theta in saved.particles.items() if kinds else ():
        for file in write_turn(theta, saved.config, saved.decode, folder, particle, kinds):
            print(f"  {file}", flush=True)
