"""rasterization/: what is seen, against rays and formulae; gradients, against finite differences; silhouettes pull at vertices."""

import math

import pytest
import torch
from torch.nn.functional import max_pool2d, normalize

from dist_vsd.cameras import cast_rays
from dist_vsd.rasterization.edges import faces_across
from dist_vsd.rasterization.nvdiffrast_back_end import has_nvdiffrast
from dist_vsd.rasterization.rasterize import antialias, coverage, interpolate, rasterize, vertex_normals
from tests.meshes import DISTANCE, HALF, area_of_ball, ball, cameras, cube, intersections, rectangle, soup

VIEWS = (10.0, 130.0, 250.0)


def rotated(vertices, seed):
    """Turned at random, so that nothing is in line with pixels."""
    generator = torch.Generator().manual_seed(seed)
    return vertices @ torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=vertices.dtype)).Q


@pytest.mark.parametrize("mesh", [soup(40), soup(200, seed=1, size=0.1), cube(), ball(1)], ids=["large", "small", "cube", "ball"])
def test_a_pixels_ray_hits_the_face_that_is_seen_where_it_is_said(mesh):
    """By Moeller and Trumbore's intersections in fp64, but where a ray passes an edge by a millionth of its triangle, or two faces lie
    as near: fp32 decides which is seen."""
    vertices, faces = mesh
    seen = rasterize(vertices, faces, cameras(VIEWS), 24)
    origins, directions = (values.reshape(-1, 3) for values in cast_rays(cameras(VIEWS), 24, 24))
    t, u, v = intersections(vertices, faces, origins, directions)
    least = torch.minimum(torch.minimum(u, v), 1 - u - v)
    t = torch.where((least >= 0) & (t > 0), t, torch.inf)
    nearest, face = t.min(1)
    second = t.scatter(1, face[:, None], torch.inf).amin(1)
    is_doubtful = (least.abs() < 1e-6).any(1) | (second - nearest < 1e-6)
    assert is_doubtful.float().mean() < 0.05
    face = torch.where(nearest < torch.inf, face, -1)
    assert torch.equal(seen.face.flatten()[~is_doubtful], face[~is_doubtful])
    is_hit = ~is_doubtful & (face >= 0)
    assert is_hit.float().mean() > 0.1
    weights = torch.stack([1 - u - v, u, v], -1)[is_hit, face[is_hit]]
    torch.testing.assert_close(seen.barycentric.flatten(0, 2)[is_hit], weights, rtol=0, atol=1e-9)  # fp64 of thin triangles
    forward = -cameras(VIEWS).c2w[:, :3, 2].repeat_interleave(24 * 24, 0)
    torch.testing.assert_close(seen.depth.flatten()[is_hit], (nearest * (directions * forward).sum(-1))[is_hit], rtol=0, atol=1e-9)


def test_a_ball_covers_the_area_of_its_cone():
    """A ball of 20,480 faces is smaller by 0.04% than the sphere; the rest is the sum over 128 rows and columns."""
    vertices, faces = ball(5)
    covered = coverage(rasterize(0.8 * rotated(vertices, 0), faces, cameras(VIEWS), 128))
    assert float(covered.min()) >= 0
    assert float(covered.max()) <= 1
    torch.testing.assert_close(covered.mean((1, 2)), torch.full((3,), area_of_ball(0.8), dtype=torch.float64), rtol=1e-3, atol=0)


def test_a_balls_normals_and_depths_are_the_spheres():
    """To what a polyhedron differs by.

    Faces have edges of 0.03, so that depths are behind by 0.8 (1 - cos 0.02) = 1e-4, more where a ray comes aslant; normals of vertices
    are not quite radial, as an icosahedron's twelve have five faces where the others have six.
    """
    vertices, faces = ball(5)
    vertices = 0.8 * rotated(vertices, 1)
    seen = rasterize(vertices, faces, cameras(VIEWS), 48)
    origins, directions = (values.view(3, 48, 48, 3) for values in cast_rays(cameras(VIEWS), 48, 48))
    along = -(origins * directions).sum(-1)
    inside = 0.8**2 - (origins + along[..., None] * directions).square().sum(-1)
    is_well_inside = inside > 0.1  # at the limb a little in radius is much in depth
    point = origins + (along - inside.clamp_min(0).sqrt())[..., None] * directions
    normal = normalize(interpolate(vertex_normals(vertices, faces), seen), dim=-1)
    torch.testing.assert_close(normal[is_well_inside], point[is_well_inside] / 0.8, rtol=0, atol=5e-3)
    depth = ((point - origins) * -cameras(VIEWS).c2w[:, None, None, :3, 2]).sum(-1)
    torch.testing.assert_close(seen.depth[is_well_inside], depth[is_well_inside], rtol=0, atol=5e-4)
    assert torch.equal(seen.is_hit[inside > 0.001], torch.ones_like(seen.is_hit[inside > 0.001]))  # there are no gaps between faces
    assert not seen.is_hit[inside < 0].any()


def test_a_cube_from_the_front_is_a_square_at_one_depth():
    """Its front is 2.5 away: a square of side 1 / (2 2.5 HALF) of the picture, whose sides are upright and so covered exactly."""
    seen = rasterize(*cube(), cameras(elevation_deg=0.0), 50)
    side = 1 / (2 * 2.5 * HALF)
    assert float(coverage(seen).mean()) == pytest.approx(side**2, rel=1e-3)  # the four pixels at the corners are not exact
    torch.testing.assert_close(seen.depth[seen.is_hit], torch.full((int(seen.is_hit.sum()),), 2.5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert len(seen.face[seen.is_hit].unique()) == 2


def test_an_upright_rectangle_covers_each_pixel_by_its_share():
    """16 pixels of 1/16 of 2 HALF DISTANCE; the rectangle reaches 0.3 of a pixel into column 5 and 0.8 into column 11."""
    pixel = 2 * HALF * DISTANCE / 16
    sides = rectangle((5.7 - 8) * pixel, (11.8 - 8) * pixel, -3 * pixel, 3 * pixel)
    row = coverage(rasterize(*sides, cameras(elevation_deg=0.0), 16))[0, 8]
    expected = torch.tensor([0] * 5 + [0.3] + [1] * 5 + [0.8] + [0] * 4, dtype=torch.float64)
    torch.testing.assert_close(row, expected, rtol=0, atol=1e-12)


def test_a_picture_is_the_same_to_the_bit_alone_and_beside_others():
    vertices, faces = soup(100, dtype=torch.float32)
    together = rasterize(vertices, faces, cameras(VIEWS, dtype=torch.float32), 20)
    for view in range(3):
        alone = rasterize(vertices, faces, cameras(VIEWS, dtype=torch.float32)[view : view + 1], 20)
        for name in ("face", "barycentric", "depth"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[view])
        assert torch.equal(coverage(alone)[0], coverage(together)[view])


def test_autocast_rounds_nothing_of_it():
    vertices, faces = soup(100, dtype=torch.float32)
    plain = rasterize(vertices, faces, cameras(VIEWS, dtype=torch.float32), 20)
    with torch.autocast("cpu", torch.bfloat16):
        inside = rasterize(vertices, faces, cameras(VIEWS, dtype=torch.float32), 20)
    assert torch.equal(plain.face, inside.face)
    assert torch.equal(interpolate(vertices, plain), interpolate(vertices, inside))


def test_barycentric_coordinates_are_shares_of_one_even_where_a_face_is_thin():
    vertices, faces = soup(500, dtype=torch.float32)
    vertices[1::3] = vertices[0::3] + 1e-5 * vertices[1::3]
    seen = rasterize(vertices, faces, cameras(VIEWS, dtype=torch.float32), 64)
    assert bool(seen.is_hit.any())
    assert float(seen.barycentric.min()) >= 0
    torch.testing.assert_close(seen.barycentric.sum(-1), seen.is_hit.float(), rtol=0, atol=1e-6)


def test_in_double_precision_a_centre_that_is_beside_a_face_by_rounding_is_taken_to_its_edge():
    """A rectangle that begins a billionth of a pixel right of column 5's centre: in fp32 it begins there."""
    pixel = 2 * HALF * DISTANCE / 16
    sides = rectangle((5.5 + 1e-9 - 8) * pixel, 3 * pixel, -3 * pixel, 3 * pixel)
    seen = rasterize(*sides, cameras(elevation_deg=0.0), 16)
    assert seen.is_hit[0, 8].tolist() == [False] * 5 + [True] * 6 + [False] * 5
    assert float(seen.barycentric.min()) == 0
    torch.testing.assert_close(seen.barycentric.sum(-1), seen.is_hit.double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_vertices", [0, 5])
def test_without_faces_there_is_an_empty_picture_and_a_gradient_of_zero(num_vertices):
    vertices = torch.ones(num_vertices, 3, requires_grad=True)
    seen = rasterize(vertices, torch.zeros(0, 3, dtype=torch.int64), cameras(VIEWS, dtype=torch.float32), 8)
    picture = antialias(interpolate(vertices, seen), seen)
    assert (picture.shape, seen.face.unique().tolist()) == ((3, 8, 8, 3), [-1])
    (picture.sum() + coverage(seen).sum() + seen.depth.sum() + vertex_normals(vertices, seen.faces).sum()).backward()
    assert torch.equal(vertices.grad, torch.zeros(num_vertices, 3))


@pytest.mark.parametrize("spoil", ["behind", "degenerate", "not a number", "a point"])
def test_what_can_not_be_seen_is_not_seen_and_has_no_gradient(spoil):
    vertices, faces = ball(1, torch.float32)
    if spoil == "behind":
        vertices = vertices * 0.5 + cameras().c2w[0, :3, 2].float() * (DISTANCE + 1)
    elif spoil == "degenerate":
        faces = faces[:, [0, 0, 1]]
    elif spoil == "not a number":
        vertices = vertices * torch.nan
    else:
        vertices = vertices * 0
    vertices.requires_grad_()
    seen = rasterize(vertices, faces, cameras(dtype=torch.float32), 16)
    assert not seen.is_hit.any()
    colors = torch.ones(len(vertices), 3, requires_grad=True)
    picture = antialias(interpolate(colors, seen), seen)
    (picture.sum() + seen.depth.sum()).backward()
    assert float(picture.detach().abs().sum()) == 0
    if spoil != "not a number":
        assert torch.equal(vertices.grad, torch.zeros_like(vertices))
    assert torch.equal(colors.grad, torch.zeros_like(colors))


def test_a_floor_that_reaches_behind_the_camera_is_seen_up_to_the_horizon():
    """From 1 above it, level: all rows below the middle, at a depth of 1 / tan of how far they look down."""
    corners = torch.tensor([[-1e3, -1e3, -1], [1e3, -1e3, -1], [1e3, 1e3, -1], [-1e3, 1e3, -1]], dtype=torch.float64)
    seen = rasterize(corners, torch.tensor([[0, 1, 2], [0, 2, 3]]), cameras(elevation_deg=0.0), 32)
    assert torch.equal(seen.is_hit[0].all(1), torch.arange(32) >= 16)
    assert not seen.is_hit[0, :16].any()
    slope = (2 * (torch.arange(16, 32, dtype=torch.float64) + 0.5) / 32 - 1) * HALF
    torch.testing.assert_close(seen.depth[0, 16:, 3], 1 / slope, rtol=1e-9, atol=0)


def generic(seed=0):
    """A mesh of a few faces, of which some hide others, with values of its vertices; nothing is in line with pixels."""
    vertices, faces = soup(6, seed=seed, size=0.9)
    generator = torch.Generator().manual_seed(seed)
    return vertices.requires_grad_(), faces, torch.rand(len(vertices), 2, generator=generator, dtype=torch.float64).requires_grad_()


def test_gradients_of_interpolation_and_depth_are_finite_differences():
    vertices, faces, colors = generic()

    def seen_values(vertices, colors):
        seen = rasterize(vertices, faces, cameras((20.0, 200.0)), 7)
        return interpolate(colors, seen), seen.depth, seen.barycentric

    assert rasterize(vertices, faces, cameras((20.0, 200.0)), 7).is_hit.sum() > 20
    torch.autograd.gradcheck(seen_values, (vertices, colors))


@pytest.mark.parametrize("seed", range(4))
def test_gradients_of_antialiasing_are_finite_differences(seed):
    """Of a picture's sum, weighted at random, by vertices and colours: inside faces, and at silhouettes."""
    vertices, faces, colors = generic(seed)
    weights = torch.rand(2, 9, 9, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def weighted(vertices, colors):
        seen = rasterize(vertices, faces, cameras((20.0, 200.0)), 9)
        return (weights * antialias(interpolate(colors, seen), seen)).sum()

    assert (rasterize(vertices, faces, cameras((20.0, 200.0)), 9).silhouettes >= 0).sum() > 20
    torch.autograd.gradcheck(weighted, (vertices, colors))


@pytest.mark.parametrize("subdivisions", [3, 4, 5, 6])
def test_the_area_of_a_ball_grows_with_its_radius_as_the_formula_says(subdivisions):
    """Faces of several pixels to a hundredth of one.

    It is a sum over some 2 pi 0.37 size rows and columns that cross the rim; at each of the eight places where those take turns one may
    be too many or too few by half: at most 4 / (2.3 size), as the ball is in the middle and the eight are alike.
    """
    vertices, faces = ball(subdivisions, torch.float32)
    for size in (32, 96):
        radius = torch.tensor(0.8, requires_grad=True)
        covered = coverage(rasterize(radius * rotated(vertices, 2), faces, cameras(VIEWS, dtype=torch.float32), size)).mean()
        (slope,) = torch.autograd.grad(covered, radius)
        formula = (area_of_ball(0.8 + 1e-5) - area_of_ball(0.8 - 1e-5)) / 2e-5
        assert float(slope) == pytest.approx(formula, rel=2 / size)


def test_a_silhouette_before_another_surface_moves_too():
    """A grey ball before a white wall: a larger ball is a darker picture, by half of what it covers."""
    (vertices, faces), (wall, wall_faces) = ball(4), rectangle(-9, 9, -9, 9, x=-1.5)
    radius = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    colors = torch.cat([torch.full((len(vertices), 1), 0.5, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64)])
    seen = rasterize(torch.cat([radius * vertices, wall]), torch.cat([faces, wall_faces + len(vertices)]), cameras(elevation_deg=0), 96)
    assert bool(seen.is_hit.all())
    (slope,) = torch.autograd.grad(antialias(interpolate(colors, seen), seen).mean(), radius)
    formula = (area_of_ball(0.8 + 1e-5) - area_of_ball(0.8 - 1e-5)) / 2e-5
    assert float(slope) == pytest.approx(-0.5 * formula, rel=0.05)


def test_edges_inside_a_surface_are_no_silhouettes():
    """Each vertex has a colour of its own; blended are the pixels at the rim alone."""
    vertices, faces = ball(2)
    seen = rasterize(0.8 * vertices, faces, cameras(VIEWS), 40)
    picture = interpolate(vertices, seen)
    is_blended = (antialias(picture, seen) != picture).any(-1)
    hit = seen.is_hit.double()
    is_rim = max_pool2d(hit, 3, 1, 1) != -max_pool2d(-hit, 3, 1, 1)
    assert is_blended.any()
    assert not (is_blended & ~is_rim).any()


def test_faces_may_go_around_in_any_sense():
    """Every third face of a ball turned around: what is covered is the same, to the rounding of edges that begin at the other end."""
    vertices, faces = ball(3)
    turned = torch.where((torch.arange(len(faces)) % 3 == 0)[:, None], faces.flip(1), faces)
    one, other = (coverage(rasterize(vertices, kind, cameras(VIEWS), 40)) for kind in (faces, turned))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_a_square_on_its_corner_grows_by_its_sides():
    """Its sides rise as they go across, exactly: they count once, not between the pixels of rows and again between those of columns."""
    half = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    corners = torch.tensor([[0.0, 0, -1], [0, 1, 0], [0, 0, 1], [0, -1, 0]], dtype=torch.float64)
    seen = rasterize(half * corners, torch.tensor([[0, 1, 2], [0, 2, 3]]), cameras(elevation_deg=0.0), 64)
    (slope,) = torch.autograd.grad(coverage(seen).mean(), half)
    assert float(slope) == pytest.approx(4 * 0.7 / (2 * HALF * DISTANCE) ** 2, rel=0.05)  # of 2 half^2; corners are a row too many or few


def test_a_ball_moves_and_grows_onto_a_mask():
    """By what its silhouette alone says; to a tenth of a pixel in place and size, where it began six pixels beside."""
    vertices, faces = ball(3, torch.float32)
    views = cameras((0.0, 90.0), elevation_deg=10.0, dtype=torch.float32)
    goal = torch.tensor([0.2, -0.15, 0.1])
    mask = coverage(rasterize(0.7 * vertices + goal, faces, views, 48)).detach()
    place, radius = torch.zeros(3, requires_grad=True), torch.tensor(0.4, requires_grad=True)
    optimizer = torch.optim.Adam([place, radius], lr=0.03)
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 80)
        loss = (coverage(rasterize(radius * vertices + place, faces, views, 48)) - mask).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tenth = 0.1 * 2 * HALF * DISTANCE / 48
    torch.testing.assert_close(place.detach(), goal, rtol=0, atol=tenth)
    assert float(radius.detach()) == pytest.approx(0.7, abs=tenth)


def test_normals_of_vertices_are_weighted_by_area():
    """A square at right angles to a triangle of half its area: two thirds point up, one third to the front."""
    vertices = torch.tensor([[0.0, 0, 0], [0, 1, 0], [-1, 0, 0], [-1, 1, 0], [0, 0, -1]])
    faces = torch.tensor([[0, 1, 2], [1, 3, 2], [0, 4, 1]])
    normals = vertex_normals(vertices, faces)
    torch.testing.assert_close(normals[1], torch.tensor([1.0, 0, 2]) / math.sqrt(5))
    torch.testing.assert_close(normals[3], torch.tensor([0.0, 0, 1]))


def test_normals_of_vertices_have_the_gradients_of_finite_differences():
    vertices, faces = ball(0)
    torch.autograd.gradcheck(lambda vertices: vertex_normals(vertices, faces), (rotated(vertices, 0).requires_grad_(),))


@pytest.mark.parametrize("vertices", [torch.zeros(4, 3), torch.ones(4, 3) * 1e-12, torch.eye(4, 3) * 1e-10, torch.eye(4, 3)])
def test_normals_of_faces_without_area_are_no_longer_than_one_and_have_finite_gradients(vertices):
    vertices = vertices.clone().requires_grad_()
    normals = vertex_normals(vertices, torch.tensor([[0, 1, 2], [0, 0, 3], [1, 1, 1]]))
    normals.sum().backward()
    assert (normals.detach().norm(dim=-1) < 1 + 1e-6).all()
    assert vertices.grad.isfinite().all()


def test_the_face_across_each_edge_is_found():
    """Three faces of one sense, a fourth at the first two's edge, and one that names a vertex twice."""
    faces = torch.tensor([[0, 1, 2], [2, 1, 3], [2, 3, 4], [1, 5, 2], [1, 2, 2]])
    across, is_turned = faces_across(faces)
    # Edge (1, 2) has faces 0, 1 and 3, each with the next; edge (3, 2) has 1 and 2.
    assert across.tolist() == [[1, -1, -1], [-1, 2, 3], [-1, -1, 1], [-1, 0, -1], [-1, -1, -1]]
    assert [bool(is_turned[face, edge]) for face, edge in ((0, 0), (1, 1), (1, 2), (2, 2), (3, 1))] == [False, False, True, False, False]
    assert bool(faces_across(torch.tensor([[0, 1, 2], [1, 2, 3]]))[1][0, 0])


def test_faces_that_are_changed_in_place_are_matched_anew():
    faces = torch.tensor([[0, 1, 2], [2, 1, 3]])
    assert faces_across(faces)[0].tolist() == [[1, -1, -1], [-1, -1, 0]]
    faces[1] = torch.tensor([3, 4, 5])
    assert faces_across(faces)[0].tolist() == [[-1, -1, -1], [-1, -1, -1]]


def test_on_a_device_on_paper_shapes_flow():
    vertices, faces = torch.ones(5, 3, device="meta", requires_grad=True), torch.ones(7, 3, dtype=torch.int64, device="meta")
    seen = rasterize(vertices, faces, cameras(VIEWS, dtype=torch.float32, device="meta"), 8)
    picture = antialias(interpolate(torch.cat([vertices, vertex_normals(vertices, faces)], -1), seen), seen)
    assert (picture.shape, coverage(seen).shape, seen.depth.shape) == ((3, 8, 8, 6), (3, 8, 8), (3, 8, 8))
    picture.sum().backward()
    assert vertices.grad.shape == (5, 3)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"vertices": torch.ones(3, 2)}, r"vertices must be \(V, 3\) of floating point, got \(3, 2\)"),
        ({"faces": torch.ones(1, 3)}, r"faces must be \(F, 3\) of int64, got \(1, 3\) of torch.float32"),
        ({"faces": torch.tensor([[0, 1, 3]])}, "faces must name vertices from 0 to 2, got 0 to 3"),
        ({"size": 0}, "at least 1 pixel a side, got 0"),
        ({"back_end": "opengl"}, "must be one of own, nvdiffrast, or empty, got 'opengl'"),
        ({"back_end": "nvdiffrast"}, "nvdiffrast needs CUDA and to be installed, got vertices on cpu"),
    ],
)
def test_what_can_not_be_rasterised_is_refused_in_a_line(change, rule):
    given = {"vertices": torch.eye(3), "faces": torch.tensor([[0, 1, 2]]), "size": 4, "back_end": ""} | change
    with pytest.raises(ValueError, match=rule):
        rasterize(given["vertices"], given["faces"], cameras(dtype=torch.float32), given["size"], given["back_end"])


@pytest.mark.skipif(not (torch.cuda.is_available() and has_nvdiffrast()), reason="needs a GPU and nvdiffrast")
def test_nvdiffrast_and_our_own_agree_but_at_the_edges_of_faces():
    """It rounds vertices to a fraction of a pixel: a pixel's centre is as near to an edge in 5% of the pixels of large faces."""
    vertices, faces = ball(2, torch.float32)
    views = cameras(VIEWS, dtype=torch.float32, device="cuda")
    both = [rasterize(vertices.cuda(), faces.cuda(), views, 256, by) for by in ("own", "nvdiffrast")]
    assert (both[0].face != both[1].face).float().mean() < 0.05
    torch.testing.assert_close(*(coverage(seen).mean((1, 2)) for seen in both), rtol=1e-3, atol=0)
