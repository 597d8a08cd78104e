"""How near a mesh is to a known scene's surface: zero for the scene itself, the difference of radii for balls."""

import pytest
import torch

from dist_vsd.evaluation.overlap import Overlap, scene_distance
from dist_vsd.evaluation.scene_surface import scene_surface, surface_distance
from dist_vsd.particles.mesh_start import lattice_points
from dist_vsd.particles.tetrahedra import march, near, tetrahedra_among

R = 64


def mesh_of(name, turn_deg=0.0, scale=1.0, grown=0.0):
    """March around a scene, or around one that is larger by ``grown`` on all sides."""
    points = lattice_points(R, 1.0)
    distance = ((scene_distance(name, turn_deg, scale, points) * scale - grown) * R / 2).reshape((R + 1,) * 3)
    kept = near(distance < 0, 1).reshape(-1).nonzero().squeeze(-1)
    return march(points[kept], distance.reshape(-1)[kept], tetrahedra_among(kept, R))


@pytest.mark.parametrize(("name", "turn_deg", "scale"), [("ball", 0.0, 1.0), ("duck", 30.0, 0.9), ("chair", 0.0, 1.0)])
def test_a_mesh_of_the_scene_itself_is_as_near_as_points_are_dense(name, turn_deg, scale):
    found = surface_distance(*mesh_of(name, turn_deg, scale), name, Overlap(1.0, turn_deg, scale, 10.0), 1.0)
    assert found.chamfer < 0.025  # 4,000 points
    assert found.normal_consistency > 0.93


def test_of_two_balls_it_is_the_difference_of_their_radii():
    near_to, far = (surface_distance(*mesh_of("ball", grown=grown), "ball", Overlap(1.0, 0.0, 1.0, 10.0), 1.0) for grown in (0.0, 0.1))
    assert far.chamfer == pytest.approx(0.1, abs=0.01)
    assert near_to.chamfer < 0.02
    assert far.normal_consistency > 0.98


def test_a_turned_duck_is_farther_from_the_duck_and_agrees_less():
    mesh = mesh_of("duck", 30.0)
    right, wrong = (surface_distance(*mesh, "duck", Overlap(1.0, turn, 1.0, 10.0), 1.0) for turn in (30.0, 210.0))
    assert wrong.chamfer > 2 * right.chamfer
    assert wrong.normal_consistency < right.normal_consistency - 0.05


def test_points_of_a_scene_are_on_its_surface_and_normals_point_outwards():
    overlap = Overlap(1.0, 40.0, 1.1, 10.0)
    points, normals = scene_surface("mug", overlap, 1.2, torch.Generator().manual_seed(0))
    distance = scene_distance("mug", 40.0, 1.1, points) * 1.1
    assert distance.abs().median() < 1e-3
    outside = scene_distance("mug", 40.0, 1.1, points + 0.02 * normals)
    assert (outside > 0).float().mean() > 0.95
