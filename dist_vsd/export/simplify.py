"""A surface made lighter: without fragments, and with fewer faces."""

from __future__ import annotations

import dataclasses

import numpy as np
import trimesh

from dist_vsd.export.surface import Surface

SMALLEST_PART = 0.01  # of the greatest part's area
# How fast fast_simplification's limit on a collapse's error rises: slower ones leave fewer faults, and may not get as far.
AGGRESSIONS = (7, 4, 2)


def as_trimesh(surface: Surface) -> trimesh.Trimesh:
    """Return the triangles alone, for what trimesh knows of them."""
    return trimesh.Trimesh(surface.vertices, surface.faces, process=False)


def drop_fragments(surface: Surface) -> tuple[Surface, int]:
    """Leave out what nobody would miss: parts far smaller than the greatest, and the walls of hollows inside, which nobody sees.

    Args:
        surface: closed, or not: only of what is closed are hollows known.

    Returns:
        The rest, and the number of parts that were left out.
    """
    mesh = as_trimesh(surface)
    part = trimesh.graph.connected_component_labels(mesh.face_adjacency, node_count=len(mesh.faces))
    area = np.bincount(part, mesh.area_faces)
    corners = mesh.triangles - mesh.vertices.mean(0)
    volume = np.bincount(part, np.einsum("ij,ij->i", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])) / 6)
    is_hollow = volume < 0 if mesh.is_watertight else np.zeros(len(area), bool)
    if is_hollow.all():
        return surface, 0
    keep = ~is_hollow & (area >= SMALLEST_PART * area[~is_hollow].max())
    return _with_faces(surface, surface.faces[keep[part]]), int((~keep).sum())


def simplify(surface: Surface, max_faces: int) -> Surface:
    """Collapse edges where that changes the shape least (quadric errors; Garland and Heckbert 1997) until few enough faces are left.

    If the surface was watertight and is not any more, it is tried again with more patience. A last resort is what was found first.

    Args:
        surface: as it was found.
        max_faces: at the most, or about: those that can't go without a change of topology stay.
    """
    import fast_simplification

    if len(surface.faces) <= max_faces:
        return surface
    was_watertight, first = as_trimesh(surface).is_watertight, None
    for aggression in AGGRESSIONS:
        vertices, faces = fast_simplification.simplify(surface.vertices, surface.faces, target_count=max_faces, agg=aggression)
        found = _with_faces(dataclasses.replace(surface, vertices=vertices), faces.astype(np.int32))
        first = first or found
        if len(found.faces) <= max_faces and (not was_watertight or as_trimesh(found).is_watertight):
            return found
    return first


def _with_faces(surface: Surface, faces: np.ndarray) -> Surface:
    """Return a surface with other faces, without the vertices that none of them has, and without an atlas."""
    used, index = np.unique(faces, return_inverse=True)
    return dataclasses.replace(surface, vertices=surface.vertices[used], faces=index.reshape(-1, 3).astype(np.int32), atlas=None)
