"""Pictures of meshes with looked-up colours, against closed forms and a mesh particle's own."""

import math

import numpy as np
import pytest
import torch
import trimesh

from dist_vsd.cameras import turntable
from dist_vsd.export.mesh_pictures import render_mesh
from dist_vsd.export.mesh_report import pictures_on_white
from tests.coloured_mesh import ColouredMesh

CAMERA = turntable(1, 0.0, 3.0, 40.0)


@pytest.mark.parametrize("is_far_first", [True, False])
def test_a_picture_of_a_ball_is_a_disc_and_the_nearer_of_two_is_seen(is_far_first):
    far, near = trimesh.creation.icosphere(4, 0.5), trimesh.creation.icosphere(4, 0.2)
    near.apply_translation([1.0, 0.0, 0.0])
    both = trimesh.util.concatenate([far, near] if is_far_first else [near, far])
    num_far = len(far.faces)
    is_near = (np.arange(len(both.faces)) >= num_far) == is_far_first  # both balls have as many faces
    size, colors = 100, np.array([[1.0, 0, 0], [0, 0, 1.0]])
    picture, covered = render_mesh(both.vertices, both.faces, lambda face, _: colors[is_near[face].astype(int)], CAMERA, size)
    focal = size / 2 / math.tan(math.radians(20))
    # A ball of radius r at distance d is seen under the angle asin(r / d). The faces' balls are smaller by a thousandth.
    areas = [math.pi * (focal * math.tan(math.asin(r / d))) ** 2 for r, d in ((0.5, 3.0), (0.2, 2.0))]
    assert float(covered.sum()) == pytest.approx(areas[0], rel=0.005)
    blue = (picture[0, 2] - picture[0, 0] + covered[0, 0]) / 2  # 1 where the near one is seen, and in parts at its silhouette
    assert float(blue.sum()) == pytest.approx(areas[1], rel=0.005)
    assert picture[0, :, 0, 0].tolist() == [1, 1, 1]


def test_what_lies_on_a_face_is_looked_up_in_perspective():
    # A floor from near to far: half way down the picture's floor is not half way along it.
    floor = np.array([[1.5, -1, -0.3], [1.5, 1, -0.3], [-9.0, 1, -0.3], [-9.0, -1, -0.3]])
    faces, size = np.array([[0, 1, 2], [0, 2, 3]]), 64
    picture, covered = render_mesh(floor, faces, lambda face, w: ((floor[faces[face]] * w[..., None]).sum(1) + 10) / 20, CAMERA, size)
    rows, columns = np.nonzero(covered[0, 0].numpy() == 1)  # not at a border, which is blended
    assert len(rows) > 200
    # The ray through a row falls by its slope: the floor is met where it has fallen by 0.3.
    slope = ((rows + 0.5) / size * 2 - 1) * math.tan(math.radians(20))
    assert np.abs(picture[0, 0].numpy()[rows, columns] * 20 - 10 - (3.0 - 0.3 / slope)).max() < 1e-4


def test_a_mesh_is_pictured_as_the_particle_that_it_is_renders_itself():
    theta = ColouredMesh()
    vertices, faces = (tensor.detach().numpy() for tensor in theta.surface())
    cameras = turntable(2, 15.0, 3.0, 40.0)

    def color(face, weights):
        return theta.color_at(torch.from_numpy((vertices[faces[face]] * weights[..., None]).sum(1))).numpy()

    found, expected = render_mesh(vertices, faces, color, cameras, 48), pictures_on_white(theta, cameras, 48)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_nothing_in_the_picture_is_white():
    ball = trimesh.creation.icosphere(1, 0.1)
    picture, covered = render_mesh(ball.vertices + 50.0, ball.faces, lambda face, _: np.zeros((len(face), 3)), CAMERA, 8)
    assert (float(picture.min()), float(covered.max())) == (1.0, 0.0)
