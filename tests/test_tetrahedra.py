"""The surface of a lattice of tetrahedra: closed, turned outwards, where the distances say, and differentiable in them."""

import itertools
import math

import pytest
import torch
import trimesh

from dist_vsd.particles.mesh_start import ball, lattice_points
from dist_vsd.particles.tetrahedra import CORNERS, EDGES, KUHN, TRIANGLES, march, near, tetrahedra_among

R = 24


def surface(distance, band=2, resolution=R, dtype=torch.float32):
    """March around a whole lattice's (S, S, S) distances, among the vertices near the surface."""
    kept = near(distance < 0, band).reshape(-1).nonzero().squeeze(-1)
    points = lattice_points(resolution, 1.0).to(dtype)[kept]
    return march(points, distance.reshape(-1)[kept].to(dtype), tetrahedra_among(kept, resolution))


def as_mesh(vertices, faces):
    return trimesh.Trimesh(vertices.detach().numpy(), faces.numpy(), process=False)


def test_six_tetrahedra_fill_a_cell_and_turn_the_same_way():
    corners = torch.tensor(CORNERS, dtype=torch.float64)
    volumes = [float(torch.linalg.det(corners[list(one[1:])] - corners[one[0]])) / 6 for one in KUHN]
    assert volumes == pytest.approx([1 / 6] * 6)


def test_a_cut_through_any_tetrahedron_faces_away_from_what_is_inside():
    corners = torch.tensor([CORNERS[corner] for corner in KUHN[3]], dtype=torch.float64)
    for code in range(1, 15):
        inside = [n for n in range(4) if code >> n & 1]
        outward = corners[[n for n in range(4) if n not in inside]].mean(0) - corners[inside].mean(0)
        for triangle in TRIANGLES[code]:
            if triangle[0] >= 0:
                a, b, c = ((corners[EDGES[edge][0]] + corners[EDGES[edge][1]]) / 2 for edge in triangle)
                assert torch.linalg.cross(b - a, c - a) @ outward > 0


def test_a_ball_is_a_closed_mesh_of_its_volume_and_area():
    mesh = as_mesh(*surface(ball(R, 1.0, 0.6)))
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.02)  # inscribed: less by (cell / radius)^2
    assert mesh.area == pytest.approx(4 * math.pi * 0.6**2, rel=0.02)


def test_any_signs_at_all_make_a_closed_surface():
    distance = torch.randn((R + 1,) * 3, generator=torch.Generator().manual_seed(0))
    for axis in range(3):
        distance.movedim(axis, 0)[[0, -1]] = 1.0
    mesh = as_mesh(*surface(distance))
    assert mesh.is_watertight
    assert mesh.is_winding_consistent


def test_the_band_changes_nothing_of_the_surface():
    distance = ball(R, 1.0, 0.5)
    whole, narrow = as_mesh(*surface(distance, band=R)), as_mesh(*surface(distance, band=1))
    assert (whole.vertices == narrow.vertices).all()
    assert (whole.faces == narrow.faces).all()


def test_a_plane_is_where_the_distances_are_zero():
    distance = lattice_points(R, 1.0)[:, 2].reshape((R + 1,) * 3) - 0.123
    vertices, _ = surface(distance)
    assert (vertices[:, 2] - 0.123).abs().max() < 1e-6


def test_gradients_of_the_area_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(1)
    distance = ball(6, 1.0, 0.55).double() + 0.1 * torch.randn((7,) * 3, generator=generator)
    distance[[0, -1]], distance[:, [0, -1]], distance[:, :, [0, -1]] = 1.0, 1.0, 1.0
    kept = near(distance < 0, 1).reshape(-1).nonzero().squeeze(-1)
    tetrahedra, points = tetrahedra_among(kept, 6), lattice_points(6, 1.0).double()[kept]

    def area(positions, values):
        vertices, faces = march(positions, values, tetrahedra)
        a, b, c = vertices[faces].unbind(1)
        return torch.linalg.cross(b - a, c - a).norm(dim=-1).sum() / 2

    values = distance.reshape(-1)[kept].requires_grad_()
    assert torch.autograd.gradcheck(area, (points.requires_grad_(), values), eps=1e-6, atol=1e-5, fast_mode=True)


def test_what_is_near_is_whole_cells_around_the_surface():
    solid = torch.zeros((R + 1,) * 3, dtype=torch.bool)
    solid[10, 10, 10] = True
    kept = near(solid, 0)
    assert kept.sum() == 27  # the corners of its eight cells
    assert near(solid, 2).sum() == 7**3
    assert all(kept[10 + i, 10 + j, 10 + k] for i, j, k in itertools.product((-1, 0, 1), repeat=3))


def test_the_border_of_the_band_is_where_a_cell_is_missing():
    solid = torch.zeros((R + 1,) * 3, dtype=torch.bool)
    solid[10, 10, 10] = True
    kept = near(solid, 1).reshape(-1).nonzero().squeeze(-1)
    assert int((~tetrahedra_among(kept, R).is_border).sum()) == 3**3  # of 5^3 vertices
