"""GLB, the binary form of glTF 2.0 (registry.khronos.org/glTF/specs/2.0), as browsers and viewers show it.

trimesh writes GLB too, but vertex colours as bytes: glTF has them linear, in which a byte is too coarse for dark colours.
"""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dist_vsd.export.mesh import Mesh
from dist_vsd.export.simplify import as_trimesh
from dist_vsd.export.surface import Surface

# glTF's up is +y and its front +z; ours are +z and +x. A scene unit is its metre.
TO_GLTF = np.array([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
UNLIT = "KHR_materials_unlit"
FLOAT, USHORT, UINT = 5126, 5123, 5125
CODES = {"<f4": FLOAT, "<u2": USHORT, "<u4": UINT}
SHAPES = {1: "SCALAR", 2: "VEC2", 3: "VEC3"}
VERTICES, INDICES = 34962, 34963  # what a part of the buffer is for
TRIANGLES, POINTS = 4, 0
LINEAR, MIPMAPS, CLAMP = 9729, 9987, 33071


def to_gltf(vectors: np.ndarray) -> np.ndarray:
    """Turn (N, 3) vectors with z up and the front to +x into glTF's, y up and the front to +z; fp32."""
    return np.ascontiguousarray(vectors @ TO_GLTF[:3, :3].T, np.float32)


def to_linear(srgb: np.ndarray) -> np.ndarray:
    """Convert sRGB in [0, 1] to linear light (IEC 61966-2-1), as glTF has the colours of vertices."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """Convert linear light in [0, 1] to sRGB (IEC 61966-2-1)."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def write_glb(mesh: Mesh, file: Path, *, with_normals: bool = True) -> None:
    """Write a mesh, upright, in metres, with normals and the colours as the particle shows them.

    Its light is in its colours, as seen: they are to be shown as they are (KHR_materials_unlit). A viewer that does not know this
    extension finds a matt material, lit.

    Args:
        mesh: to write.
        file: to write it to.
        with_normals: for viewers that light it all the same.
    """
    glb = _Glb()
    texture = mesh.texture
    copies = slice(None) if texture is None else texture.atlas.vertex
    attributes = {"POSITION": glb.add(to_gltf(mesh.vertices[copies]), VERTICES, with_range=True)}
    if with_normals:
        attributes["NORMAL"] = glb.add(to_gltf(mesh.normals[copies]), VERTICES)
    if texture is None:
        attributes["COLOR_0"] = glb.add_colors(mesh.vertex_colors)
        faces, base_color = mesh.faces, {}
    else:
        attributes["TEXCOORD_0"] = glb.add(texture.atlas.uv, VERTICES)
        faces, base_color = texture.atlas.faces, {"baseColorTexture": {"index": glb.add_picture(texture.picture)}}
    kind = "<u2" if faces.max() < 2**16 - 1 else "<u4"
    indices = glb.add(faces.reshape(-1).astype(kind), INDICES)
    is_closed = as_trimesh(Surface(mesh.vertices, mesh.faces, lambda points: points)).is_watertight
    glb.write(file, {"attributes": attributes, "indices": indices, "mode": TRIANGLES}, base_color, double_sided=not is_closed)


def write_points_glb(points: np.ndarray, colors: np.ndarray, file: Path) -> None:
    """Write (N, 3) points with (N, 3) colours in [0, 1]."""
    glb = _Glb()
    attributes = {"POSITION": glb.add(to_gltf(points), VERTICES, with_range=True), "COLOR_0": glb.add_colors(colors)}
    glb.write(file, {"attributes": attributes, "mode": POINTS}, {}, double_sided=False)


class _Glb:
    """A buffer that grows, and what glTF says of its parts."""

    def __init__(self) -> None:
        self.buffer, self.views, self.accessors, self.pictures = bytearray(), [], [], {}

    def add_bytes(self, content: bytes, **more: Any) -> int:
        """Add a part, beginning at a multiple of four bytes; return its number."""
        self.buffer += bytes(-len(self.buffer) % 4)
        self.views.append({"buffer": 0, "byteOffset": len(self.buffer), "byteLength": len(content)} | more)
        self.buffer += content
        return len(self.views) - 1

    def add(self, values: np.ndarray, target: int, with_range: bool = False) -> int:
        """Add numbers, little endian; return their accessor's number."""
        values = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
        columns = values.shape[1] if values.ndim == 2 else 1
        ranges = {"min": values.min(0).tolist(), "max": values.max(0).tolist()} if with_range else {}
        kind = {"componentType": CODES[values.dtype.str], "count": len(values), "type": SHAPES[columns]}
        self.accessors.append({"bufferView": self.add_bytes(values.tobytes(), target=target)} | kind | ranges)
        return len(self.accessors) - 1

    def add_colors(self, colors: np.ndarray) -> int:
        """Add the colours of vertices, sRGB in [0, 1], as linear fp32."""
        return self.add(to_linear(colors.astype(np.float64)).astype(np.float32), VERTICES)

    def add_picture(self, picture: np.ndarray) -> int:
        """Add an (H, W, 3) uint8 picture as a texture, sRGB as glTF has them; return its number."""
        content = io.BytesIO()
        Image.fromarray(picture).save(content, "PNG")
        self.pictures = {
            "images": [{"bufferView": self.add_bytes(content.getvalue()), "mimeType": "image/png"}],
            "samplers": [{"magFilter": LINEAR, "minFilter": MIPMAPS, "wrapS": CLAMP, "wrapT": CLAMP}],
            "textures": [{"sampler": 0, "source": 0}],
        }
        return 0

    def write(self, file: Path, primitive: dict[str, Any], base_color: dict[str, Any], double_sided: bool) -> None:
        """Write a scene of one primitive."""
        matt = {"metallicFactor": 0.0, "roughnessFactor": 1.0} | base_color
        material = {"pbrMetallicRoughness": matt, "extensions": {UNLIT: {}}}
        self.buffer += bytes(-len(self.buffer) % 4)
        tree = {
            "asset": {"version": "2.0", "generator": "dist_vsd"},
            "extensionsUsed": [UNLIT],
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": [{"mesh": 0, "name": file.stem}],
            "meshes": [{"primitives": [primitive | {"material": 0}]}],
            "materials": [material | ({"doubleSided": True} if double_sided else {})],
            "accessors": self.accessors,
            "bufferViews": self.views,
            "buffers": [{"byteLength": len(self.buffer)}],
            **self.pictures,
        }
        text = json.dumps(tree, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 4)
        chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(self.buffer), b"BIN\0") + bytes(self.buffer)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks)
