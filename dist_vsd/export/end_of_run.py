"""What a run leaves of its particles when it is through: pictures or turntables, and meshes for whoever watches it."""

from __future__ import annotations

from pathlib import Path

from dist_vsd.cameras import turntable
from dist_vsd.export.turntable import render_views, write_turntable
from dist_vsd.image_files import write_png
from dist_vsd.reporting.reporter import Reporter
from dist_vsd.training.state import TrainingState

# What wandb shows of the particles at the end; `dist-vsd export` makes meshes of all, as fine as one likes.
MOST_MESHES, MESH_RESOLUTION, MESH_THRESHOLD = 8, 96, 10.0


def write_pictures(state: TrainingState, path: Path) -> None:
    """Write a turntable, or the picture, of each particle that this rank owns into ``path``/export."""
    config, device = state.config, state.prior.device
    num_views = 1 if config.is_flat else 40
    cameras = turntable(num_views, 15.0, sum(config.camera.distance) / 2, sum(config.camera.fov_deg) / 2).to(device)
    for particle in state.particles:
        if state.layout.owner(particle.id) == state.layout.rank:
            state.placement.fetch([particle])
            frames = render_views(particle.theta, cameras, max(128, config.render_size), state.prior.decode)
            if config.is_flat:
                write_png(frames, path / "export" / f"picture_{particle.id:04d}.png")
            else:
                write_turntable(frames, path / "export" / f"turntable_{particle.id:04d}")
            state.placement.release([particle])


def show_meshes(state: TrainingState, path: Path, reporter: Reporter) -> None:
    """Write a mesh of each of the first particles into ``path``/export, and report them (collective)."""
    from dist_vsd.export.mesh_files import write_glb  # its libraries take a second, which runs without a watcher need not pay
    from dist_vsd.export.surface import surface_of

    names, notes = [], []
    for particle in state.particles:
        if state.layout.owner(particle.id) == state.layout.rank and particle.id < MOST_MESHES:
            name = f"export/mesh_{particle.id:04d}.glb"
            state.placement.fetch([particle])
            try:
                write_glb(surface_of(particle.theta, "mesh", MESH_RESOLUTION, MESH_THRESHOLD), path / name)
                names.append(name)
            except ValueError:
                notes.append(f"particle {particle.id} has no mesh: nothing in it is denser than {MESH_THRESHOLD:g}")
            state.placement.release([particle])
    state.placement.settle()
    rows = state.collectives.gather_json([names, notes])
    for note in (note for row in rows for note in row[1]):
        reporter.event(state.stage.last, note)
    if meshes := sorted(name for row in rows for name in row[0]):
        reporter.show(state.stage.last, {"media/mesh": meshes})
