"""A mesh: a deformable tetrahedral lattice whose signed distances say where the surface is, and a colour for every point.

ProlificDreamer's second and third stages (section 4.2) optimise such a mesh by Fantasia3D's way of it: the geometry by SDS on normal
maps, then the texture by VSD. Only what is near the surface is kept of the lattice: the surface moves within that band, and the band
follows it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_vsd.cameras import Cameras, cast_rays
from dist_vsd.normal_maps import color_normals
from dist_vsd.particles import mesh_start
from dist_vsd.particles.colored_particle import ColoredParticle, as_images
from dist_vsd.particles.derived import Derived
from dist_vsd.particles.given_mesh import GivenMesh, distances_to
from dist_vsd.particles.hidden_space import hidden_space
from dist_vsd.particles.iso_level import density_volume, suitable_threshold
from dist_vsd.particles.mesh_regularizers import laplacian, normal_consistency
from dist_vsd.particles.owned_particle import THETA, load_theta, replace_parameter
from dist_vsd.particles.particle import Particle, Render
from dist_vsd.particles.particle_configs import MeshSettings
from dist_vsd.particles.radiance_field import RadianceField
from dist_vsd.particles.tetrahedra import Tetrahedra, find, lattice_coordinates, march, near, tetrahedra_among
from dist_vsd.rasterization.antialias import antialias
from dist_vsd.rasterization.fragments import interpolate
from dist_vsd.rasterization.normals import vertex_normals
from dist_vsd.rasterization.rasterize import rasterize

GEOMETRY = ("vertices", "distance", "deformation", "given_vertices", "given_faces", "given_uv")
DENSITY_INSIDE = 100.0
# Of the silhouettes' best fit: at the level that fits them best a soft field may have dents, which they don't show. With it the overlap of
# the gallery's cube is 0.92, without it 0.75; of its ball, cone and donut it changes by less than 0.04.
SLACK = 0.03
MOST_DEFORMATION = 0.45  # of a cell: less than a half, or neighbours could change places


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a band of the lattice and of the surface in it, how many there are of each."""

    edges: int
    corners: int
    vertices: int
    faces: int


@functools.lru_cache(maxsize=4)
def ball_sizes(resolution: int, band: int, bound: float, radius: float) -> Sizes:
    """Count what a ball is made of."""
    with torch.utils._python_dispatch._disable_current_modes(), torch.device("cpu"), torch.no_grad():
        distances = mesh_start.ball(resolution, bound, radius)
        kept = near(distances < 0, band).reshape(-1).nonzero().squeeze(-1)
        tetrahedra = tetrahedra_among(kept, resolution)
        vertices, faces = march(mesh_start.lattice_points(resolution, bound)[kept], distances.reshape(-1)[kept], tetrahedra)
    return Sizes(len(tetrahedra.edges), len(tetrahedra.corners), len(vertices), len(faces))


class MeshParticle(ColoredParticle):
    """A particle in 3D whose geometry is a surface.

    Args:
        settings: sizes and learning rates.
        generator: draws the start of its colours, on the CPU; the geometry begins as a ball.
    """

    def __init__(self, settings: MeshSettings, generator: torch.Generator) -> None:
        super().__init__(settings.field, generator)
        self.mesh_config = settings.mesh
        # A user's mesh that is painted as it is; without one, empty.
        self.register_buffer("given_vertices", torch.zeros(0, 3))
        self.register_buffer("given_faces", torch.zeros(0, 3, dtype=torch.int64))
        self.register_buffer("given_uv", torch.zeros(0, 2))
        self.forget()
        self.register_buffer("vertices", torch.zeros(0, dtype=torch.int64))
        self.distance, self.deformation = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(0, 3))
        self.set_distances(mesh_start.ball(settings.mesh.resolution, self.config.bound, self.config.density_radius))

    def forget(self) -> None:
        """See Particle: what is known of the lattice's connections and of a surface that takes no step."""
        self._tetrahedra: Derived[Tetrahedra] | None = None
        self._marched: Derived[tuple[Tensor, Tensor]] | None = None

    @property
    def cell(self) -> float:
        """Length of a cell of the lattice, scene units."""
        return 2 * self.config.bound / self.mesh_config.resolution

    def set_distances(self, distances: Tensor) -> None:
        """Begin the geometry from (S, S, S) signed distances, in cells and negative inside, at all vertices of the lattice."""
        kept = near(distances < 0, self.mesh_config.band).reshape(-1)
        device = self.vertices.device
        self.vertices = kept.nonzero().squeeze(-1).to(device)
        self.distance = nn.Parameter(distances.reshape(-1)[kept].to(device))
        self.deformation = nn.Parameter(torch.zeros(len(self.vertices), 3, device=device))

    def tetrahedra(self) -> Tetrahedra:
        """Return the tetrahedra among the vertices that are kept, made once for each band."""
        if self._tetrahedra is None or self._tetrahedra.is_outdated(self.vertices):
            self._tetrahedra = Derived((self.vertices,), tetrahedra_among(self.vertices, self.mesh_config.resolution))
        return self._tetrahedra.value

    def distances_within(self, tetrahedra: Tetrahedra) -> Tensor:
        """Return the (N,) signed distances, in cells; those at the border of the band stay as they are, so that the surface is closed."""
        return torch.where(tetrahedra.is_border, self.distance.detach(), self.distance)

    def surface(self) -> tuple[Tensor, Tensor]:
        """Return the surface's vertices (V, 3), in scene units, and faces (F, 3), counter-clockwise from outside; differentiable.

        One that takes no step, as while its colours are painted, is found once.
        """
        if self.vertices.is_meta:
            return self._assumed_surface()
        if len(self.given_faces):
            return self.given_vertices, self.given_faces
        made_of = self.vertices, self.distance, self.deformation
        if any(tensor.requires_grad for tensor in made_of):
            self._marched = None  # a fused optimizer's step leaves no mark on what it writes to
            return self._march()
        if self._marched is None or self._marched.is_outdated(*made_of):
            self._marched = Derived(made_of, self._march())
        return self._marched.value

    def _march(self) -> tuple[Tensor, Tensor]:
        tetrahedra, resolution = self.tetrahedra(), self.mesh_config.resolution
        moved = lattice_coordinates(self.vertices, resolution) + MOST_DEFORMATION * self.deformation.tanh()
        positions = moved * self.cell - self.config.bound
        return march(positions, self.distances_within(tetrahedra), tetrahedra)

    def _assumed_surface(self) -> tuple[Tensor, Tensor]:
        """Stand for a surface where shapes alone are computed with: as many vertices and faces as the ball has that it begins as."""
        field = self.config
        sizes = ball_sizes(self.mesh_config.resolution, self.mesh_config.band, field.bound, field.density_radius)
        if self._tetrahedra is None:  # what is kept beside the particle is memory, too
            shapes = {"edges": (sizes.edges, 2), "corners": (sizes.corners, 4), "edges_of": (sizes.corners, 6)}
            held = {name: self.vertices.new_zeros(shape) for name, shape in shapes.items()}
            tetrahedra = Tetrahedra(**held, is_border=self.distance > 0, triangles=torch.zeros(0), bits=torch.zeros(0))
            self._tetrahedra = Derived((self.vertices,), tetrahedra)
        vertices = self.deformation[: sizes.vertices] + self.distance[: sizes.vertices, None]
        return vertices, self.vertices.new_zeros(sizes.faces, 3)

    def render(self, cameras: Cameras, size: int, drawn: Mapping[str, Tensor] | None = None) -> Render:
        """Render B images by rasterisation, its silhouettes antialiased; see Particle.render.

        Regularizers: ``normal_consistency`` and ``laplacian`` of the whole surface; see mesh_regularizers.
        """
        batch = len(cameras)
        vertices, faces = self.surface()
        fragments = rasterize(vertices, faces, cameras, size)
        is_hit = fragments.is_hit[..., None].to(vertices.dtype)  # (B, H, W, 1)
        points = interpolate(vertices, fragments)
        normal = nn.functional.normalize(interpolate(vertex_normals(vertices, faces), fragments), dim=-1)
        color = self._colors_of(points.reshape(-1, 3), fragments.is_hit.reshape(-1)).view_as(points)
        depth = (points - cameras.c2w[:, None, None, :3, 3]).norm(dim=-1, keepdim=True)
        layers = antialias(torch.cat([is_hit * color, is_hit * normal, is_hit, is_hit * depth], -1), fragments)
        foreground, normal, opacity, depth = layers.split([3, 3, 1, 1], -1)
        directions = cast_rays(cameras, size, size)[1].reshape(-1, 3)
        background = self.background_behind(directions, batch, drawn).view_as(foreground)

        def pictures(values: Tensor) -> Tensor:
            return as_images(values.reshape(-1, values.shape[-1]), batch, size)

        return Render(
            pictures(foreground + (1 - opacity) * background),
            pictures(opacity),
            pictures(foreground),
            {
                "normal_consistency": lambda: normal_consistency(vertices, faces),
                "laplacian": lambda: laplacian(vertices, faces) / self.cell**2,
            },
            normal=pictures(color_normals(normal, cameras.c2w[:, None, None], opacity)),
            depth=pictures(depth / opacity.clamp_min(1e-6)),
        )

    def _colors_of(self, points: Tensor, is_hit: Tensor) -> Tensor:
        """Return the (N, 3) colours at points that are on the surface; zeros elsewhere, where the network is not asked."""
        on_surface = is_hit.nonzero().squeeze(-1)  # their number is known by the device alone: it is waited for
        return torch.zeros_like(points).index_put((on_surface,), self.color_at(points[on_surface]))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return Adam's groups: the distances, the deformation, and those of the colours and the background."""
        config = self.mesh_config
        own = [
            {"name": "distance", "params": [self.distance], "lr": config.distance_lr},
            {"name": "deformation", "params": [self.deformation], "lr": config.deformation_lr},
        ]
        return own + super().parameter_groups()

    def changes_at(self, update: int) -> bool:
        """See Particle: every ``band_every`` updates in which the geometry learns."""
        return update > 0 and update % self.mesh_config.band_every == 0 and self.distance.requires_grad

    @torch.no_grad()
    def after_update(self, update: int, generator: torch.Generator, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Let the band follow the surface: vertices that are near it now are kept with their moments, or added."""
        distances = self.distances_on_lattice()
        kept = near(distances < 0, self.mesh_config.band).reshape(-1).nonzero().squeeze(-1)
        if torch.equal(kept, self.vertices):
            return
        rows, is_old = find(self.vertices, kept)  # what is added takes over some vertex's moments: they soon forget it
        replace_parameter(self, optimizer, "distance", distances.reshape(-1)[kept], rows)
        replace_parameter(self, optimizer, "deformation", torch.where(is_old[:, None], self.deformation[rows], 0.0), rows)
        self.vertices = kept

    @torch.no_grad()
    def distances_on_lattice(self) -> Tensor:
        """Return the (S, S, S) signed distances, in cells, at all vertices of the lattice: beyond the band, plus or minus its width.

        A row of the lattice begins outside, and crosses the surface within the band alone: what is not kept has the side of the vertex
        that was kept last before it in its row.
        """
        side, device = self.mesh_config.resolution + 1, self.vertices.device
        numbers = torch.zeros(side**3, dtype=torch.int64, device=device)
        numbers[self.vertices] = torch.arange(1, len(self.vertices) + 1, device=device)
        last = numbers.reshape(-1, side).cummax(-1).values.reshape(-1)
        known = torch.cat([torch.ones(1, device=device), self.distance])
        beyond = torch.where(known[last] < 0, -1.0, 1.0) * self.mesh_config.band
        return torch.where(numbers > 0, known[numbers], beyond).reshape(side, side, side)

    @torch.no_grad()
    def seen_density(self, points: Tensor) -> Tensor:
        """Return the same as ``density``."""
        return self.density(points)

    @torch.no_grad()
    def density(self, points: Tensor) -> Tensor:
        """Return (N,) densities at (N, 3) points, so that what measures volumes takes a mesh, too: DENSITY_INSIDE, and 0 outside."""
        grid = points.flip(-1).reshape(1, 1, 1, -1, 3) / self.config.bound
        distance = nn.functional.grid_sample(self.distances_on_lattice()[None, None], grid, align_corners=True, padding_mode="border")
        return torch.where(distance.reshape(-1) < 0, DENSITY_INSIDE, 0.0)

    @classmethod
    def from_particle(cls, config: MeshSettings, other: Particle, generator: torch.Generator) -> MeshParticle:
        """Begin from a radiance field, whose colours are taken over, or from another mesh.

        Raises:
            ValueError: it can't begin from that one.
        """
        if not isinstance(other, RadianceField | MeshParticle):
            raise ValueError(f"a mesh can't begin from {type(other).__name__}: start from a radiance_field or a mesh")
        if other.config.track_origin or config.field.track_origin:
            raise ValueError("a mesh stays where it is: leave the origin of the field that it begins from too, --field.no-track-origin")
        if other.config.bound != config.field.bound:
            named = f"--field.bound {other.config.bound}, got {config.field.bound}"
            raise ValueError(f"a mesh begins in the cube of what it begins from: {named}")
        started = cls(config, generator)
        started._take_colors(other)
        if isinstance(other, MeshParticle):
            started._take_surface(other)
        else:
            started._begin_from(other)
        return started

    def begin_from_mesh(self, given: GivenMesh, is_refined: bool) -> None:
        """Begin from a user's mesh: as a lattice whose surface can be refined, or as it is, with its places on a texture, to be painted."""
        self.set_distances(distances_to(given, self.mesh_config.resolution, self.config.bound))
        if is_refined:
            self.notes = (f"it begins from a mesh of {len(given.faces):,} faces, on the lattice {len(self.surface()[1]):,}",)
            return
        self.given_vertices, self.given_faces, self.given_uv = given.vertices, given.faces, given.uv
        self.notes = (f"it begins from a mesh of {len(given.faces):,} faces, which stays as it is",)

    def _take_colors(self, other: ColoredParticle) -> None:
        given, own = other.state_dict(), {name: value for name, value in self.state_dict().items() if name not in GEOMETRY}
        if any(name not in given or given[name].shape != value.shape for name, value in own.items()):
            raise ValueError("the particles to start from have colours of other sizes: use the --field settings that they were made with")
        self.load_state_dict({name: given[name] for name in own}, strict=False)

    def _take_surface(self, other: MeshParticle) -> None:
        if other.mesh_config.resolution == self.mesh_config.resolution:
            load_theta(self, {f"{THETA}{name}": value for name, value in (self.state_dict() | other.state_dict()).items()})
            return
        size = (self.mesh_config.resolution + 1,) * 3
        coarse = other.distances_on_lattice()[None, None]
        finer = nn.functional.interpolate(coarse, size, mode="trilinear", align_corners=True)[0, 0]
        self.set_distances(finer * (other.cell / self.cell))

    def _begin_from(self, field: RadianceField) -> None:
        """Begin at the surface of a field, or at a ball where it has none; ``notes`` say which."""
        config, bound = self.mesh_config, self.config.bound
        density = mesh_start.values_on_lattice(field.seen_density, config.resolution, bound).numpy()
        volume = density_volume(field, config.resolution)
        threshold, fault = config.threshold, ""
        if not threshold:
            try:
                threshold = suitable_threshold(field, volume, SLACK)
            except ValueError as error:
                fault = str(error).partition(":")[0]
        hidden = hidden_space(field, volume, mesh_start.lattice_points(config.resolution, bound)).view(density.shape).numpy()
        solid = mesh_start.solid_of(density, threshold, config.least_fragment, hidden)
        if fault := fault or solid.fault:
            remedy = "give the stage before more updates, or name --mesh.threshold"
            self.notes = (f"it has no surface to begin from, as {fault}: it begins as a ball; {remedy}",)
            return
        self.set_distances(mesh_start.distances_from(density, solid.inside, threshold))
        removed = f", {solid.num_removed} fragment(s) left out" if solid.num_removed else ""
        self.notes = (f"its surface is where the density is {threshold:.3g}: {len(self.surface()[1]):,} faces{removed}",)
