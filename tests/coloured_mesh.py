"""Mesh particles whose colours are known at each point."""

import torch

from dist_vsd.particles.given_mesh import GivenMesh
from dist_vsd.particles.mesh import MeshParticle
from dist_vsd.particles.particle_configs import DenseGridConfig, MeshConfig, MeshSettings, RadianceFieldConfig

SETTINGS = MeshSettings(MeshConfig(resolution=24), RadianceFieldConfig(dense_grid=DenseGridConfig(resolutions=(4,)), hidden_width=4))


def color_of(points):
    """Return smooth colours, which a bilinear texture has nearly exactly."""
    return 0.5 + 0.4 * torch.sin(3 * points)


class ColouredMesh(MeshParticle):
    """A ball on the lattice, or a mesh that is given, coloured by ``color_of``."""

    def __init__(self, given=None, settings=SETTINGS):
        super().__init__(settings, torch.Generator().manual_seed(0))
        if given is not None:
            self.begin_from_mesh(given, is_refined=False)

    def color_at(self, points):
        return color_of(points)


def given(mesh, vertices=None, uv=None):
    """Return a trimesh as a user's own mesh, where it stands: with its vertices as they are, or those copies of them and their places."""
    vertices, faces = (mesh.vertices, mesh.faces) if vertices is None else vertices
    places = torch.zeros(0, 2) if uv is None else torch.tensor(uv, dtype=torch.float32)
    return GivenMesh(torch.tensor(vertices, dtype=torch.float32), torch.tensor(faces), places)
