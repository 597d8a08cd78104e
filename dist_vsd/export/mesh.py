"""A particle as a mesh: its surface, made light enough, with a texture or with colours at the vertices."""

from __future__ import annotations

import dataclasses

import numpy as np

from dist_vsd.export.atlas import fault_of, unwrap
from dist_vsd.export.mesh_pictures import Colors
from dist_vsd.export.simplify import as_trimesh, drop_fragments, simplify
from dist_vsd.export.surface import Atlas, Surface
from dist_vsd.export.texture import Texture, bake

MOST_FACES = 50_000  # of a mesh with a texture, if nobody says


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """How a mesh is made.

    Attributes:
        texture_size: height and width of the texture, texels; 0: colours at vertices.
        max_faces: at the most; 0: MOST_FACES with a texture, all without, where the vertices have to hold the colours. Of a user's own
            mesh 0 is all.
        keep_fragments: small parts and inner walls stay, as they do of a user's own mesh.
    """

    texture_size: int = 1024
    max_faces: int = 0
    keep_fragments: bool = False

    @property
    def most_faces(self) -> int:
        """The limit, whoever set it; 0: none."""
        return self.max_faces or (MOST_FACES if self.texture_size else 0)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """What is written.

    Attributes:
        vertices: (V, 3) fp32, scene units, z up.
        faces: (F, 3) int32.
        normals: (V, 3) fp32 unit vectors, outwards.
        vertex_colors: (V, 3) fp32 in [0, 1], sRGB.
        texture: or None: the vertices' colours are all there is.
        num_found: faces before any were left out.
        num_fragments: parts that were left out.
        note: why a user's own places on a texture are not kept; empty where they are, or where there are none.
    """

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray
    vertex_colors: np.ndarray
    texture: Texture | None
    num_found: int
    num_fragments: int
    note: str = ""

    def colors(self) -> Colors:
        """Return what looks up the colour of a point on a face: in the texture, or between the corners'."""
        if self.texture is not None:
            return self.texture.colors()
        corners = self.vertex_colors[self.faces]
        return lambda face, weights: (corners[face] * weights[..., None]).sum(1)


def make_mesh(surface: Surface, options: MeshOptions) -> Mesh:
    """Make the mesh of a surface.

    Args:
        surface: of a particle.
        options: what of it to keep.
    """
    found, num_fragments, note = surface, 0, ""
    if not (options.keep_fragments or surface.is_given):
        surface, num_fragments = drop_fragments(surface)
    if most_faces := options.max_faces if surface.is_given else options.most_faces:
        surface = simplify(surface, most_faces)
    texture = None
    if options.texture_size:
        atlas, note = _atlas_of(surface, found)
        texture = bake(surface, atlas, options.texture_size)
    colors = surface.colors_at(surface.vertices)
    return Mesh(surface.vertices, surface.faces, _normals(surface), colors, texture, len(found.faces), num_fragments, note)


def _atlas_of(surface: Surface, found: Surface) -> tuple[Atlas, str]:
    """Return a user's own atlas where that serves, or else a new one, and why."""
    if found.atlas is None:
        return unwrap(surface), ""
    fault = fault_of(surface, found.atlas) if surface.atlas else "do not fit fewer faces"
    return (unwrap(surface) if fault else found.atlas), fault and f"its own places on a texture {fault}: it gets new ones"


def _normals(surface: Surface) -> np.ndarray:
    """Return unit normals at the vertices; up where there is none, as files want each to have one."""
    normals = np.array(as_trimesh(surface).vertex_normals, np.float32)
    normals[~(np.abs(np.linalg.norm(normals, axis=1) - 1) < 1e-3)] = (0.0, 0.0, 1.0)
    return normals
