"""A radiance field as GLB: a mesh with colours that browsers show."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import trimesh

from dist_vsd.export.ply import write_ply
from dist_vsd.particles.radiance_field import RadianceField

# glTF's up is +y and its front +z; ours are +z and +x.
TO_GLTF = np.array([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])


def write_glb(field: RadianceField, file: Path, resolution: int, threshold: float) -> int:
    """Write a field's surface with a colour at each vertex.

    Args:
        field: the particle.
        file: to write.
        resolution: cells a side of the sampled cube.
        threshold: density of the surface, 1 / scene units.

    Returns:
        The number of vertices.

    Raises:
        ValueError: nothing is as dense as the threshold.
    """
    with tempfile.TemporaryDirectory() as folder:
        ply = Path(folder) / "mesh.ply"
        count = write_ply(field, ply, "mesh", resolution, threshold)
        mesh = trimesh.load_mesh(ply, process=False)
    mesh.apply_transform(TO_GLTF)
    file.parent.mkdir(parents=True, exist_ok=True)
    mesh.export(file)
    return count
