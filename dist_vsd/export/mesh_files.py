"""Surfaces as files: PLY, and GLB, which browsers show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from trimesh.exchange.gltf import export_glb

# glTF's up is +y and its front +z; ours are +z and +x.
TO_GLTF = np.array([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])


def write_ply(surface: trimesh.Trimesh | trimesh.PointCloud, file: Path) -> None:
    """Write a surface with its colours as PLY, in scene units, z up.

    Args:
        surface: see surface_of().
        file: to write, with its folder.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    surface.export(file)


def write_glb(surface: trimesh.Trimesh | trimesh.PointCloud, file: Path) -> None:
    """Write a surface with its colours as GLB, upright as glTF has it, in a matt material.

    Args:
        surface: see surface_of().
        file: to write, with its folder.
    """
    turned = surface.copy()
    turned.apply_transform(TO_GLTF)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(export_glb(trimesh.Scene(turned), include_normals=hasattr(turned, "faces"), tree_postprocessor=_make_matt))


def _make_matt(tree: dict[str, Any]) -> None:
    """Give what has no material one: glTF's own default is polished metal, which shows colours dark."""
    tree["materials"] = [{"pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}, "doubleSided": True}]
    for mesh in tree["meshes"]:
        for primitive in mesh["primitives"]:
            primitive["material"] = 0


WRITERS = {"ply": write_ply, "glb": write_glb}
