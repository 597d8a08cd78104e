"""What a mesh is like, and what was lost from the particle to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.export.mesh import Mesh
from dist_vsd.export.mesh_pictures import render_mesh
from dist_vsd.export.simplify import as_trimesh
from dist_vsd.export.surface import Surface
from dist_vsd.export.turntable import training_turn
from dist_vsd.particles.particle import Particle
from dist_vsd.priors.clip import ClipScorer

NUM_VIEWS, LEAST_PIXELS, MOST_PIXELS = 8, 64, 128
FINER = 2  # pixels are averages of so many squared, of the particle's as of the mesh's: of what is sharp, edges are smooth in both


def describe(mesh: Mesh) -> dict[str, Any]:
    """Return what a mesh is like: lengths in scene units, which are a GLB's metres.

    Returns:
        JSON's types: is_watertight, num_faces, num_faces_found (before any were left out), num_fragments_dropped, num_vertices, bounds
        (two corners, z up), area and, of a texture, its size, texels_per_unit, coverage and num_charts.
    """
    triangles = as_trimesh(Surface(mesh.vertices, mesh.faces, lambda points: points))
    texture = mesh.texture and {
        "size": len(mesh.texture.picture),
        "texels_per_unit": round(mesh.texture.texels_per_unit, 2),
        "coverage": round(mesh.texture.coverage, 4),
        "num_charts": mesh.texture.atlas.num_charts,
    }
    return {
        "is_watertight": bool(triangles.is_watertight),
        "num_faces": len(mesh.faces),
        "num_faces_found": mesh.num_found,
        "num_fragments_dropped": mesh.num_fragments,
        "num_vertices": len(mesh.vertices),
        "bounds": [[round(float(place), 5) for place in corner] for corner in triangles.bounds],
        "area": round(float(triangles.area), 5),
        "texture": texture,
    }


def what_was_lost(mesh: Mesh, theta: Particle, camera: Any, render_size: int, scorer: ClipScorer | None, prompt: str) -> dict[str, Any]:
    """Compare the mesh's pictures with the particle's own, both on white, over a turn of training's cameras.

    Args:
        mesh: made of theta.
        theta: in 3D.
        camera: configuration of the run's cameras.
        render_size: of the run, pixels.
        scorer: a CLIP, if there is one.
        prompt: of the run.

    Returns:
        JSON's types: num_views, size, psnr_db (of the mean squared error of all views), psnr_opaque_db (likewise if the mesh had the
        particle's own colour in each pixel, made opaque: what is missing there is the softness of the particle's edges, which no mesh
        has), silhouette_iou and, where there is a CLIP, clip_particle and clip_mesh: mean cosines of the views and the prompt.
    """
    cameras, size = training_turn(camera, NUM_VIEWS), min(max(render_size, LEAST_PIXELS), MOST_PIXELS)
    expected, opacity = pictures_on_white(theta, cameras, size * FINER)
    found, covered = render_mesh(mesh.vertices, mesh.faces, mesh.colors(), cameras, size * FINER)
    expected, opacity, found, covered = (torch.nn.functional.avg_pool2d(x, FINER) for x in (expected, opacity, found, covered))
    both, either = ((opacity > 0.5) & (covered > 0.5)).sum(), ((opacity > 0.5) | (covered > 0.5)).sum()
    lost = {
        "num_views": NUM_VIEWS,
        "size": size,
        "psnr_db": round(psnr_db(found, expected), 2),
        "psnr_opaque_db": round(psnr_db(covered * (1 + (expected - 1) / opacity.clamp_min(1e-3)).clamp(0, 1) + 1 - covered, expected), 2),
        "silhouette_iou": round(float(both / either.clamp_min(1)), 4),
    }
    if scorer is not None:
        device = scorer.model.device
        text = scorer.embed_texts([prompt])
        for name, pictures in (("clip_particle", expected), ("clip_mesh", found)):
            with torch.no_grad():
                lost[name] = round(float((scorer.embed_images(pictures.to(device)) @ text.T).mean()), 4)
    return lost


@torch.no_grad()
def pictures_on_white(theta: Particle, cameras: Cameras, size: int) -> tuple[Tensor, Tensor]:
    """Render a particle without its own background.

    Returns:
        (B, 3, size, size) in [0, 1] and (B, 1, size, size) opacities, on the CPU.
    """
    device = next(theta.parameters()).device
    renders = [theta.render(cameras[i : i + 1].to(device), size) for i in range(len(cameras))]
    opacity = torch.cat([render.opacity.cpu() for render in renders])
    return (torch.cat([render.foreground.cpu() for render in renders]) + 1 - opacity).clamp(0, 1), opacity


def psnr_db(found: Tensor, expected: Tensor) -> float:
    """Return the peak signal-to-noise ratio of pictures in [0, 1], dB: 10 log10(1 / mean squared error); 100 at the most."""
    return min(100.0, float(-10 * (found - expected).square().mean().clamp_min(1e-12).log10()))


def in_words(report: dict[str, Any]) -> list[str]:
    """Return what to print of a report: what it is, its texture, and what was lost."""
    closed = "watertight" if report["is_watertight"] else "not watertight"
    dropped = f", {count} fragments left out" if (count := report["num_fragments_dropped"]) else ""
    low, high = report["bounds"]
    extent = " x ".join(f"{b - a:.2f}" for a, b in zip(low, high, strict=True))
    lines = [
        f"{report['num_faces']:,} faces of {report['num_faces_found']:,} found{dropped}, {report['num_vertices']:,} vertices, {closed}, "
        f"{extent} scene units"
    ]
    if texture := report["texture"]:
        lines.append(
            f"texture of {texture['size']} texels a side: {texture['texels_per_unit']:.0f} texels per scene unit, "
            f"{texture['coverage']:.0%} of it covered by {texture['num_charts']} charts"
        )
    lost = report["lost"]
    words = f"beside the particle: PSNR {lost['psnr_db']:.1f} dB ({lost['psnr_opaque_db']:.1f} with its own colours, made opaque)"
    words += f", silhouettes {lost['silhouette_iou']:.1%} the same"
    if "clip_mesh" in lost:
        words += f", CLIP score {lost['clip_mesh']:.3f} for its {lost['clip_particle']:.3f}"
    return [*lines, f"{words} ({lost['num_views']} views of {lost['size']} pixels)"]
