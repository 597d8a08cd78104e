"""Meshes and points as files: PLY, OBJ with its texture, and GLB (glb.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import trimesh

from dist_vsd.export.glb import to_gltf, write_glb, write_points_glb
from dist_vsd.export.mesh import Mesh
from dist_vsd.image_files import write_picture


def write_ply(mesh: Mesh, file: Path) -> list[Path]:
    """Write a mesh with its colours at vertices as PLY, in scene units, z up."""
    surface = trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_colors=_bytes(mesh.vertex_colors), process=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    surface.export(file)
    return [file]


def write_obj(mesh: Mesh, file: Path, upright: bool = True) -> list[Path]:
    """Write a mesh as OBJ: with a material (MTL) and its texture (PNG), or with colours at the vertices.

    Args:
        mesh: to write.
        file: of the mesh.
        upright: y up and the front to +z, as in glTF; else z up, in the axes of the scene.

    Returns:
        The files, which name each other and are to stay in one folder.
    """
    texture, files = mesh.texture, [file]
    vertices, along = (to_gltf(mesh.vertices), to_gltf(mesh.normals)) if upright else (mesh.vertices, mesh.normals)
    normals = [f"vn {x:.4f} {y:.4f} {z:.4f}" for x, y, z in along]
    file.parent.mkdir(parents=True, exist_ok=True)
    if texture is None:
        head = []
        rows = np.hstack([vertices, mesh.vertex_colors])
        places = [f"v {x:.6f} {y:.6f} {z:.6f} {r:.4f} {g:.4f} {b:.4f}" for x, y, z, r, g, b in rows]
        faces = [f"f {a}//{a} {b}//{b} {c}//{c}" for a, b, c in mesh.faces + 1]
    else:
        material, picture = file.with_suffix(".mtl"), file.with_name(f"{file.stem}_texture.png")
        write_picture(texture.picture, picture)
        # Kd alone, without light: what is seen is the texture.
        material.write_text(f"newmtl {file.stem}\nKa 1 1 1\nKd 1 1 1\nKs 0 0 0\nd 1\nillum 0\nmap_Kd {picture.name}\n")
        files += [material, picture]
        head = [f"mtllib {material.name}", f"usemtl {file.stem}"]
        places = [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in vertices]
        places += [f"vt {u:.6f} {1 - v:.6f}" for u, v in texture.atlas.uv]
        pairs = zip(mesh.faces + 1, texture.atlas.faces + 1, strict=True)
        faces = [f"f {a}/{i}/{a} {b}/{j}/{b} {c}/{k}/{c}" for (a, b, c), (i, j, k) in pairs]
    file.write_text("\n".join([*head[:1], *places, *normals, *head[1:], *faces, ""]))
    return files


def write_mesh_glb(mesh: Mesh, file: Path) -> list[Path]:
    """Write a mesh as GLB; see glb.py."""
    write_glb(mesh, file)
    return [file]


def write_points(points: np.ndarray, colors: np.ndarray, file: Path) -> None:
    """Write (N, 3) points with (N, 3) colours in [0, 1] as PLY or GLB, whichever the file's name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".glb":
        write_points_glb(points, colors, file)
    else:
        trimesh.PointCloud(points, _bytes(colors)).export(file)


def _bytes(colors: np.ndarray) -> np.ndarray:
    return (colors * 255).round().astype(np.uint8)


WRITERS = {"glb": write_mesh_glb, "obj": write_obj, "ply": write_ply}
