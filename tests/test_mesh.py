"""A mesh particle: where it begins, that its surface stays closed as it moves, and what it shows."""

import dataclasses
import math
import weakref

import pytest
import torch
import trimesh

from dist_vsd.cameras import turntable
from dist_vsd.particles import mesh_start
from dist_vsd.particles.iso_level import _best_level
from dist_vsd.particles.mesh import MeshParticle
from dist_vsd.particles.mesh_regularizers import laplacian, normal_consistency
from dist_vsd.particles.owned_particle import OwnedParticle
from dist_vsd.particles.particle_configs import DenseGridConfig, MeshConfig, MeshSettings, RadianceFieldConfig, SirenConfig
from dist_vsd.particles.radiance_field import RadianceField
from dist_vsd.particles.siren import SirenParticle

FIELD = RadianceFieldConfig(dense_grid=DenseGridConfig(resolutions=(8,)), hidden_width=8)
SETTINGS = MeshSettings(MeshConfig(resolution=24), FIELD)
CELL, RADIUS = 2 / 24, 0.5
TWO_BALLS = ((0.2, 0.1, 0.0), 0.4), ((-0.3, 0.0, 0.2), 0.35)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ball():
    return MeshParticle(SETTINGS, generator())


class Balls(RadianceField):
    """A field whose density is known: DENSITY within balls of the given centres and radii, falling linearly to 0 over a cell."""

    DENSITY = 40.0

    def __init__(self, *balls, config=FIELD):
        super().__init__(config, generator())
        self.balls = balls

    def forward(self, points):
        depth = torch.stack([radius - (points - torch.tensor(center)).norm(dim=-1) for center, radius in self.balls]).amax(0)
        return self.DENSITY * (depth / CELL + 0.5).clamp(0, 1), self.color_at(points)


def with_threshold(threshold):
    return dataclasses.replace(SETTINGS, mesh=dataclasses.replace(SETTINGS.mesh, threshold=threshold))


def as_mesh(theta):
    vertices, faces = theta.surface()
    return trimesh.Trimesh(vertices.detach().numpy(), faces.numpy(), process=False)


def test_it_begins_as_a_closed_ball():
    mesh = as_mesh(ball())
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * RADIUS**3, rel=0.03)


@pytest.mark.parametrize("center", [(0.0, 0.0, 0.0), (0.2, -0.1, 0.3)])
def test_it_begins_at_the_surface_of_a_field_and_takes_over_its_colours(center):
    field = Balls((center, RADIUS))
    theta = MeshParticle.from_particle(with_threshold(Balls.DENSITY / 2), field, generator(1))
    mesh = as_mesh(theta)
    radii = (torch.from_numpy(mesh.vertices).float() - torch.tensor(center)).norm(dim=-1)
    assert (radii - RADIUS).abs().max() < 0.35 * CELL
    assert mesh.is_watertight
    points = torch.from_numpy(mesh.vertices).float()
    assert torch.equal(theta.color_at(points), field.color_at(points))
    assert f"{len(mesh.faces):,} faces" in theta.notes[0]


def test_the_level_of_the_surface_is_found_by_itself():
    theta = MeshParticle.from_particle(SETTINGS, Balls(((0.1, 0.0, 0.0), RADIUS)), generator(1))
    assert as_mesh(theta).volume == pytest.approx(4 / 3 * math.pi * RADIUS**3, rel=0.25)
    assert "its surface is where the density is" in theta.notes[0]


def test_a_lower_level_is_taken_where_silhouettes_fit_nearly_as_well():
    greatest = torch.tensor([10.0] * 90 + [3.0] * 2 + [1.0] * 8, dtype=torch.float64)
    solid = greatest > 5
    assert _best_level(greatest, solid) == 6.5
    assert _best_level(greatest, solid, slack=0.03) == 2.0  # 90 of 92 rays


def test_fragments_and_cavities_of_a_field_are_left_out():
    field = Balls(((0.0, 0.0, 0.0), RADIUS), ((0.8, 0.8, 0.8), 0.12))
    theta = MeshParticle.from_particle(SETTINGS, field, generator(1))
    assert len(as_mesh(theta).split(only_watertight=False)) == 1
    assert "1 fragment(s) left out" in theta.notes[0]
    points = mesh_start.lattice_points(24, 1.0)
    density = (field.density(points) * (points.norm(dim=-1) > 0.25)).reshape(25, 25, 25).numpy()
    assert mesh_start.solid_of(density, 20.0, 0.05).inside[12, 12, 12]


@pytest.mark.parametrize(
    ("balls", "fault"),
    [
        ([((0.0, 0.0, 0.0), -1.0)], "nothing is denser than"),
        ([((0.0, 0.0, 0.0), 0.06)], "of the cube alone"),
        ([((0.0, 0.0, 0.0), 5.0)], "of the cube"),
    ],
    ids=["empty", "tiny", "full"],
)
def test_a_field_without_an_object_is_told_and_a_ball_begins_instead(balls, fault):
    theta = MeshParticle.from_particle(with_threshold(10.0), Balls(*balls), generator(1))
    (note,) = theta.notes
    assert fault in note
    assert "it begins as a ball; give the stage before more updates, or name --mesh.threshold" in note
    assert as_mesh(theta).volume == pytest.approx(4 / 3 * math.pi * RADIUS**3, rel=0.03)


def test_a_surface_that_fills_its_cube_is_closed_within_it():
    theta = MeshParticle.from_particle(with_threshold(10.0), Balls(((0.0, 0.0, 0.9), 0.7)), generator(1))
    mesh = as_mesh(theta)
    assert mesh.is_watertight
    assert mesh.bounds.max() < 1.0


def test_it_can_not_begin_from_a_picture_nor_from_colours_of_other_sizes():
    with pytest.raises(ValueError, match="can't begin from SirenParticle: start from a radiance_field or a mesh"):
        MeshParticle.from_particle(SETTINGS, SirenParticle(SirenConfig(), generator()), generator())
    with pytest.raises(ValueError, match="colours of other sizes: use the --field settings"):
        MeshParticle.from_particle(SETTINGS, RadianceField(dataclasses.replace(FIELD, hidden_width=16), generator()), generator())
    with pytest.raises(ValueError, match="a mesh stays where it is: leave the origin of the field"):
        MeshParticle.from_particle(SETTINGS, RadianceField(dataclasses.replace(FIELD, track_origin=True), generator()), generator())
    with pytest.raises(ValueError, match="--field.bound 2.0, got 1.0"):
        MeshParticle.from_particle(SETTINGS, RadianceField(dataclasses.replace(FIELD, bound=2.0), generator()), generator())


def test_the_band_follows_the_surface_which_stays_closed_and_keeps_its_moments():
    theta = ball()
    owned = OwnedParticle.of(0, theta, ["distance", "deformation"])
    for update in range(1, 13):
        for parameter in owned.parameters:
            parameter.grad = torch.zeros_like(parameter)
        theta.distance.grad += 1.0  # grows everywhere
        for group in owned.optimizer.param_groups:
            group["lr"] = 0.25
        owned.optimizer.step()
        if update % 4 == 0:
            theta.after_update(update, generator(), owned.optimizer)
            assert theta.distance in owned.optimizer.state
            assert len(owned.optimizer.state[theta.distance]["exp_avg"]) == len(theta.vertices) == len(theta.deformation)
    mesh = as_mesh(theta)
    assert mesh.is_watertight
    # Twelve steps of a quarter of a cell; where the band ended it had to wait until it was moved.
    assert RADIUS + 2 * CELL < mesh.bounds[1, 0] <= RADIUS + 3.1 * CELL


def test_the_border_of_the_band_takes_no_step():
    theta = ball()
    theta.surface()[0].square().sum().backward()
    border = theta.tetrahedra().is_border
    assert border.any()
    assert theta.distance.grad[border].abs().max() == 0


def test_the_whole_lattice_is_inside_where_the_mesh_is():
    theta = MeshParticle.from_particle(SETTINGS, Balls(*TWO_BALLS), generator(1))
    points = 2 * torch.rand(400, 3, generator=generator()) - 1
    depth = torch.maximum(*(radius - (points - torch.tensor(center)).norm(dim=-1) for center, radius in TWO_BALLS))
    clear = depth.abs() > 0.5 * CELL
    assert torch.equal(theta.density(points)[clear] > 0, depth[clear] > 0)


@pytest.mark.parametrize("resolution", [24, 40])
def test_a_mesh_begins_from_a_mesh_also_of_another_resolution(resolution):
    first = MeshParticle.from_particle(SETTINGS, Balls(((0.2, 0.1, 0.0), 0.4)), generator(1))
    settings = dataclasses.replace(SETTINGS, mesh=dataclasses.replace(SETTINGS.mesh, resolution=resolution))
    second = MeshParticle.from_particle(settings, first, generator(2))
    assert as_mesh(second).volume == pytest.approx(as_mesh(first).volume, rel=0.03)
    if resolution == 24:
        assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    points = torch.rand(9, 3, generator=generator())
    assert torch.equal(first.color_at(points), second.color_at(points))


def test_a_saved_state_of_another_size_is_put_back_to_the_bit():
    theta = MeshParticle.from_particle(SETTINGS, Balls(((0.2, 0.1, 0.0), 0.4)), generator(1))
    fresh = OwnedParticle.of(0, ball())
    assert len(fresh.theta.vertices) != len(theta.vertices)
    fresh.restore(OwnedParticle.of(0, theta).tensors())
    cameras = turntable(2, 15.0, 2.9, 41.0)
    with torch.no_grad():
        assert torch.equal(fresh.theta.render(cameras, 24).image, theta.render(cameras, 24).image)


def test_a_surface_that_takes_no_step_is_found_once_and_another_one_anew():
    theta = ball()
    OwnedParticle.of(0, theta, ["mlp"])  # what is not named takes no step
    first = theta.surface()
    assert theta.surface()[0] is first[0]
    with torch.no_grad():
        theta.distance.add_(0.5)
    smaller = theta.surface()[0]
    assert smaller.norm(dim=-1).mean() < first[0].norm(dim=-1).mean()
    owned = OwnedParticle.of(0, theta, ["distance"])
    for _ in range(2):  # with gradient and without
        before = theta.surface()[0]
        assert before.requires_grad
        before.square().sum().backward()
        owned.optimizer.step()
        with torch.no_grad():
            assert not torch.equal(theta.surface()[0], before)


def test_a_mesh_that_leaves_the_device_leaves_nothing_there():
    owned = OwnedParticle.of(0, ball(), ["mlp"])
    tetrahedra, surface = owned.theta.tetrahedra(), owned.theta.surface()
    kept = [weakref.ref(tensor) for tensor in (tetrahedra.corners, surface[0], owned.theta.distance, owned.theta.vertices)]
    del tetrahedra, surface
    owned.replace_tensors(lambda _name, tensor: tensor.clone())
    assert [tensor() for tensor in kept] == [None] * 4


def test_regularisers_are_those_of_a_cube_and_an_octahedron():
    cube = trimesh.creation.box((1.0, 1.0, 1.0))
    vertices, faces = torch.tensor(cube.vertices), torch.tensor(cube.faces)
    assert float(normal_consistency(vertices, faces)) == pytest.approx(12 / 18)  # of 18 edges twelve are right angles, six are diagonals
    flat = vertices * torch.tensor([1.0, 1.0, 0.0])
    assert float(normal_consistency(flat[[0, 2, 4, 6]], torch.tensor([[0, 1, 2], [2, 1, 3]]))) == pytest.approx(0.0)
    assert float(normal_consistency(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))) == 0.0
    corners = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    sides = torch.tensor([[a, b, c] for a in (0, 1) for b in (2, 3) for c in (4, 5)])
    turned = torch.linalg.det(corners[sides]) < 0
    sides[turned] = sides[turned].flip(1)
    assert float(laplacian(corners, sides)) == pytest.approx(1.0)  # the four neighbours of each vertex are around the middle


@pytest.mark.parametrize("regularizer", [normal_consistency, laplacian])
def test_a_step_down_a_regulariser_smooths_a_rough_ball(regularizer):
    sphere = trimesh.creation.icosphere(subdivisions=2)
    faces = torch.tensor(sphere.faces)
    noise = 0.03 * torch.randn(len(sphere.vertices), 3, generator=generator(), dtype=torch.float64)
    rough = (torch.tensor(sphere.vertices) + noise).requires_grad_()
    before = regularizer(rough, faces)
    (gradient,) = torch.autograd.grad(before, rough)
    for step in (0.01, 0.02):
        moved = rough.detach() - step * gradient / gradient.abs().max()
        assert regularizer(moved, faces) < before
        before = regularizer(moved, faces)


def test_a_render_shows_colours_before_the_background_and_normals_along_the_camera():
    with torch.no_grad():
        shown = ball().render(turntable(4, 0.0, 2.9, 41.0), 48)
    assert torch.allclose(shown.image, shown.foreground + (1 - shown.opacity), atol=1e-6)
    middle = shown.normal[:, :, 23:25, 23:25].mean((2, 3))
    assert torch.allclose(middle, torch.tensor([0.5, 0.5, 1.0]).expand(4, 3), atol=0.02)
    corner = shown.normal[:, :, 0, 0]
    assert torch.equal(corner, torch.ones(4, 3))
    assert shown.depth[:, 0, 23:25, 23:25].mean() == pytest.approx(2.9 - RADIUS, abs=0.01)
    # Of a sphere: the tangent cone's share of the picture.
    tangent = RADIUS / math.sqrt(2.9**2 - RADIUS**2)
    assert float(shown.opacity.mean()) == pytest.approx(math.pi * (tangent / (2 * math.tan(math.radians(20.5)))) ** 2, rel=0.03)


@pytest.mark.parametrize("channel", ["color", "normal"])
def test_every_group_has_a_gradient_from_what_it_is_seen_by(channel):
    theta = ball()
    shown = theta.render(turntable(2, 15.0, 2.9, 41.0), 32)
    (shown.channel(channel) * torch.rand(shown.image.shape, generator=generator())).sum().backward()
    gradients = {name.split(".")[0]: parameter.grad for name, parameter in theta.named_parameters()}
    moved = {name for name, gradient in gradients.items() if gradient is not None and gradient.abs().sum() > 0}
    expected = {"distance", "deformation"} | ({"encoding", "hidden", "output"} if channel == "color" else set())
    assert moved == expected


def test_a_target_of_normals_turns_a_ball_into_an_ellipsoid():
    config = dataclasses.replace(SETTINGS.mesh, distance_lr=0.1, band_every=5)
    theta = MeshParticle(dataclasses.replace(SETTINGS, mesh=config), generator())
    target = MeshParticle.from_particle(SETTINGS, Stretched(((0.0, 0.0, 0.0), 0.5)), generator(1))
    owned = OwnedParticle.of(0, theta, ["distance", "deformation"])
    cameras = turntable(4, 20.0, 2.9, 41.0)
    with torch.no_grad():
        wanted = target.render(cameras, 48)
    before = iou(theta, target)
    for update in range(60):
        shown = theta.render(cameras, 48)
        loss = (shown.normal - wanted.normal).square().mean() + 0.05 * shown.regularizers["normal_consistency"]()
        owned.optimizer.zero_grad()
        loss.backward()
        owned.optimizer.step()
        if theta.changes_at(update):
            theta.after_update(update, generator(), owned.optimizer)
    assert before < 0.7
    assert iou(theta, target) > 0.85  # on the lattice; deformed vertices stand for the rest
    assert as_mesh(theta).is_watertight


class Stretched(Balls):
    """A ball, flattened along z."""

    def forward(self, points):
        return super().forward(points * torch.tensor([1.0, 1.0, 1.6]))


def iou(one, other):
    a, b = one.distances_on_lattice() < 0, other.distances_on_lattice() < 0
    return float((a & b).sum() / (a | b).sum())
