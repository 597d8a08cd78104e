"""T3Bench (He et al. 2023, arXiv 2310.02977): the meshes that its scripts take, and the views that they score.

Read in its code (THU-LYJ-Lab/T3Bench at 6367462): run_eval_quality.py and run_caption.py look for
outputs_mesh_t3/METHOD_GROUP/PROMPT*/save/it*-export/model.obj, spaces of the prompt being underscores; render/meshrender.py moves the
mesh's vertices to a mean of zero and scales their largest coordinate to 1, and takes 162 x 5 pictures of 512 pixels, unlit, before black:
from the vertices of trimesh's icosphere of two subdivisions at a distance of 2.2, with vertical fields of view of 60, 45, 36, 30 and 24
degrees, as NNN_F.png. render/meshrender_cap.py takes 12 for captions, as NNN.png, of 60 degrees from those of the icosahedron; these stand
2.2 times as far, as the radius is multiplied twice there. A mesh that is missing counts as black pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import trimesh
from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.config import RunConfig
from dist_vsd.evaluation.protocols.folders import Folder, write_pictures
from dist_vsd.export.mesh import MeshOptions, make_mesh
from dist_vsd.export.mesh_files import write_obj
from dist_vsd.export.resolution import suitable_resolution
from dist_vsd.export.surface import Surface, find_surface
from dist_vsd.particles.mesh import MeshParticle
from dist_vsd.particles.particle import Particle
from dist_vsd.particles.radiance_field import RadianceField

RADIUS = 2.2
FOVS_DEG = (60.0, 45.0, 36.0, 30.0, 24.0)
SUBDIVISIONS = 2
CAPTION_RADIUS, CAPTION_FOV_DEG, CAPTION_SUBDIVISIONS = 2.2 * 2.2, 60.0, 0
MESHES, VIEWS, CAPTIONS = "outputs_mesh_t3", "views", "captions"
NO_SURFACE = "no_surface.txt"
LONGEST_NAME = 255  # bytes, of a file


def folder_name(kind: str, method: str, group: str, prompt: str, seed: int) -> str:
    """Return the name of the folder of a particle.

    T3Bench has one object for each prompt: another particle is another seed_N, each laid out as T3Bench's own folder.

    Args:
        kind: MESHES, VIEWS or CAPTIONS.
        method: its name.
        group: of the prompts: single, surr or multi.
        prompt: as T3Bench has it.
        seed: from 0.
    """
    return f"seed_{seed}/{kind}/{method}_{group}/{prompt.replace(' ', '_')}"


def require_name(prompt: str) -> None:
    """Refuse a prompt that can't be the name of a folder that T3Bench finds by a pattern; ValueError."""
    fault = "has one of / * ? [ ]" if set(prompt) & set("/*?[]") else "begins with a dot" if prompt.startswith(".") else ""
    if len(prompt.encode()) > LONGEST_NAME:
        fault = f"is longer than {LONGEST_NAME} bytes"
    if fault:
        raise ValueError(f"prompt {prompt[:60]!r} {fault}, T3Bench has prompts as names of folders: leave its runs out")


def group_of(file: Path) -> str:
    """Return the group of a file of prompts: single of prompt_single.txt."""
    return file.stem.removeprefix("prompt_")


def look_at(points: Tensor, center: Tensor, fov_deg: float) -> Cameras:
    """Place cameras that look at a point, z being up, or y where they look along z, as T3Bench does.

    Args:
        points: (B, 3) where they stand.
        center: (3,) at what they look.
        fov_deg: vertical field of view, degrees.
    """
    backward = torch.nn.functional.normalize(points - center, dim=-1)
    is_along_z = backward[:, 2].abs() >= 0.99
    above = torch.where(is_along_z[:, None], points.new_tensor([0.0, 1.0, 0.0]), points.new_tensor([0.0, 0.0, 1.0]))
    right = torch.nn.functional.normalize(torch.linalg.cross(above, backward), dim=-1)
    c2w = torch.eye(4).repeat(len(points), 1, 1)
    c2w[:, :3] = torch.stack([right, torch.linalg.cross(backward, right), backward, points], -1)
    azimuth, elevation = torch.rad2deg(torch.atan2(backward[:, 1], backward[:, 0])), torch.rad2deg(backward[:, 2].clamp(-1, 1).asin())
    return Cameras(c2w, torch.full_like(azimuth, fov_deg).deg2rad(), torch.remainder(azimuth + 180, 360) - 180, elevation)


def cameras_around(center: Tensor, scale: float, subdivisions: int, radius: float, fovs_deg: tuple[float, ...]) -> Cameras:
    """Place cameras around an object as T3Bench has them around one that it moved to the origin and made 1 large.

    Args:
        center: (3,) of the object, scene units.
        scale: of the object, scene units.
        subdivisions: of the icosahedron on whose vertices they stand.
        radius: distance from the object, of its scale.
        fovs_deg: fields of view at each place, which turn fastest.
    """
    vertices = torch.tensor(trimesh.creation.icosphere(subdivisions=subdivisions).vertices, dtype=torch.float32)
    points = center + radius * scale * vertices
    by_fov = [look_at(points, center, fov_deg) for fov_deg in fovs_deg]
    order = [fov * len(points) + place for place in range(len(points)) for fov in range(len(fovs_deg))]
    return Cameras.cat(by_fov)[order]


def view_names() -> list[str]:
    """Return the names of the pictures that are scored, in the order of their cameras."""
    return [f"{place:03d}_{fov}.png" for place in range(10 * 4**SUBDIVISIONS + 2) for fov in range(len(FOVS_DEG))]


def caption_names() -> list[str]:
    """Return the names of the pictures that are described."""
    return [f"{place:03d}.png" for place in range(10 * 4**CAPTION_SUBDIVISIONS + 2)]


def surface_of(theta: RadianceField | MeshParticle, config: RunConfig, free_bytes: int) -> Surface:
    """Return a particle's surface, a field's at the resolution that suits it.

    Raises:
        ValueError: it has none.
    """
    cells = suitable_resolution(theta, config, free_bytes).cells if isinstance(theta, RadianceField) else 0
    return find_surface(theta, cells)


def write_mesh(folder: Folder, theta: RadianceField | MeshParticle, config: RunConfig, update: int, free_bytes: int) -> None:
    """Write a particle's mesh with its texture, z up as T3Bench's cameras have it, or why it has none.

    Args:
        folder: of ``folder_name``.
        theta: the particle.
        config: of its run.
        update: updates done.
        free_bytes: of memory.
    """
    folder.begin()
    try:
        surface = surface_of(theta, config, free_bytes)
    except ValueError as error:
        (folder.beside / NO_SURFACE).write_text(f"{error}\n")
    else:
        write_obj(make_mesh(surface, MeshOptions()), folder.beside / "save" / f"it{update}-export" / "model.obj", upright=False)
    folder.finish()


def place_of_mesh(folder: Path) -> tuple[Tensor, float] | None:
    """Return centre (3,) and scale, scene units, by which T3Bench moves and scales the mesh of a folder; None if it has none."""
    files = sorted(folder.glob("save/it*-export/model.obj"))
    if not files:
        return None
    vertices = np.asarray(trimesh.load(files[-1], force="mesh").vertices)
    center = vertices.mean(0)
    return torch.tensor(center, dtype=torch.float32), float(np.abs(vertices - center).max())


def write_views(folder: Folder, theta: Particle, cameras: Cameras | None, names: list[str], size: int, tell: Callable[[], None]) -> None:
    """Write pictures of the particle itself before black; black ones where it has no surface, as T3Bench does.

    Args:
        folder: of ``folder_name``.
        theta: the particle.
        cameras: one for each name; None: it has no surface.
        names: of the pictures.
        size: height and width, pixels.
        tell: called after each picture.
    """
    device = next(theta.parameters()).device
    on_device = cameras.to(device) if cameras is not None else None

    @torch.no_grad()
    def render(view: int) -> tuple[Tensor]:
        if on_device is None:
            return (torch.zeros(1, 3, size, size),)
        return (theta.render(on_device[view : view + 1], size).foreground,)

    write_pictures(folder, [(name,) for name in names], render, tell)


def write_all_views(meshes: Folder, views: Folder, captions: Folder, theta: Particle, size: int, tell: Callable[[], None]) -> None:
    """Write the pictures to be scored and those to be described, as far as they are not complete.

    Args:
        meshes: of the particle, complete: where it is and how large.
        views, captions: of ``folder_name``.
        theta: the particle.
        size: height and width, pixels.
        tell: called after each picture.
    """
    placed = place_of_mesh(meshes.path)
    for folder, names, where in (
        (views, view_names(), (SUBDIVISIONS, RADIUS, FOVS_DEG)),
        (captions, caption_names(), (CAPTION_SUBDIVISIONS, CAPTION_RADIUS, (CAPTION_FOV_DEG,))),
    ):
        if not folder.is_complete():
            write_views(folder, theta, cameras_around(*placed, *where) if placed else None, names, size, tell)


def why_no_mesh(folder: Folder) -> str:
    """Return why a folder of a mesh has none; empty if it has one."""
    file = folder.path / NO_SURFACE
    return file.read_text().strip() if file.exists() else ""
