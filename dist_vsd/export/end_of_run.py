"""What a run leaves of its particles when it is through: pictures or turntables, and meshes for whoever watches it."""

from __future__ import annotations

from pathlib import Path

from dist_vsd.export.turntable import write_turn
from dist_vsd.reporting.reporter import Reporter
from dist_vsd.training.state import TrainingState

# A quick mesh of each of the first particles, with colours at its vertices; `dist-vsd export` makes meshes of all, as fine as one likes.
MOST_MESHES, MESH_RESOLUTION = 8, 96


def write_pictures(state: TrainingState, path: Path) -> None:
    """Write a turntable, or the picture, of each particle that this rank owns into ``path``/export."""
    for particle in state.particles:
        if state.layout.owner(particle.id) == state.layout.rank:
            state.placement.fetch([particle])
            write_turn(particle.theta, state.config, state.prior.decode, path / "export", particle.id)
            state.placement.release([particle])


def write_meshes(state: TrainingState, path: Path, reporter: Reporter) -> None:
    """Write a mesh of each of the first particles into ``path``/export, and report them (collective)."""
    from dist_vsd.export.glb import write_glb  # its libraries take a second, which runs without a watcher need not pay
    from dist_vsd.export.mesh import MeshOptions, make_mesh
    from dist_vsd.export.surface import find_surface

    names, notes = [], []
    for particle in state.particles:
        if state.layout.owner(particle.id) == state.layout.rank and particle.id < MOST_MESHES:
            name = f"export/mesh_{particle.id:04d}.glb"
            state.placement.fetch([particle])
            try:
                write_glb(make_mesh(find_surface(particle.theta, MESH_RESOLUTION), MeshOptions(texture_size=0)), path / name)
                names.append(name)
            except ValueError as error:
                notes.append(f"particle {particle.id} has no mesh: {error}")
            state.placement.release([particle])
    state.placement.settle()
    rows = state.collectives.gather_json([names, notes])
    for note in (note for row in rows for note in row[1]):
        reporter.event(state.stage.last, note)
    if meshes := sorted(name for row in rows for name in row[0]):
        reporter.show(state.stage.last, {"media/mesh": meshes})
