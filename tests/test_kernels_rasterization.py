"""kernels/rasterization.py and silhouettes.py: every implementation gives the bits of plain torch."""

import pytest
import torch

from dist_vsd.kernels import rasterization
from dist_vsd.kernels.choice import served_by
from dist_vsd.kernels.rasterization import nearest_faces
from dist_vsd.kernels.silhouettes import crossing_edges
from dist_vsd.rasterization.edges import faces_across
from dist_vsd.rasterization.fragments import fragments_of
from dist_vsd.rasterization.rasterize import clip_positions
from tests.each_kernel import DEVICE, EACH, TRITON_AND_C
from tests.meshes import ball, cameras, soup


def clip_of(vertices, size=1.0):
    return clip_positions(size * vertices.float(), cameras((15.0, 140.0), dtype=torch.float32)).to(DEVICE)


def nasty():
    """Through and behind the camera, in one point and in a line, as near as each other, no numbers, beyond all bounds."""
    generator = torch.Generator().manual_seed(3)
    clip = torch.randn(2, 90, 4, generator=generator)
    clip[:, 30:60, 3] = clip[:, 30:60, 3].abs() + 1
    clip[:, 60:63] = clip[:, 60:61]  # a point
    clip[:, 64] = (clip[:, 63] + clip[:, 65]) / 2  # a line
    clip[:, 66:69] = clip[:, 33:36]  # the same face again
    clip[:, 69, 0], clip[:, 70, 1], clip[:, 71, 3] = torch.nan, torch.inf, -torch.inf
    clip[:, 72:75] *= 1e12
    clip[:, 75:78, :3] *= 1e-12
    clip[:, 78:81, 3] = 0
    clip[:, 81:84, :2] = torch.tensor([[-1.0, -1], [1, -1], [-1, 1]]) * 3  # edges through pixels' centres
    clip[:, 81:84, 3] = 3
    faces = torch.cat([torch.arange(90).view(-1, 3), torch.randint(0, 90, (20, 3), generator=generator)])
    return clip.to(DEVICE), faces.to(DEVICE)


def mesh(made, size=1.0):
    return clip_of(made[0], size), made[1].to(DEVICE)


def turned():
    """A ball of which every third face goes around in the other sense."""
    vertices, faces = ball(1)
    return vertices, torch.where((torch.arange(len(faces)) % 3 == 0)[:, None], faces.flip(1), faces)


def aslant():
    """Squares on their corners, with sides that rise as they go across, exactly."""
    corners = torch.tensor([[0.0, -0.75, 1, 1], [0.75, 0, 1, 1], [0, 0.75, 1, 1], [-0.75, 0, 1, 1]])
    return torch.stack([corners, 0.75 * corners]).to(DEVICE), torch.tensor([[0, 1, 2], [0, 2, 3]], device=DEVICE)


# Faces of a box of more than 256 pixels have programs of their own in Triton: of the large ones in 20 by 20 pixels and of the nasty ones.
MESHES = {
    "large": (mesh(soup(12, size=2.0)), 20),
    "small": (mesh(soup(40, seed=1, size=0.3)), 18),
    "tiny": (mesh(ball(3), 0.5), 12),
    "nasty": (nasty(), 19),
    "a single pixel": (mesh(ball(0)), 1),
    "turned": (mesh(turned()), 12),
    "aslant": (aslant(), 16),
    "nothing": (mesh((torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))), 4),
}
EACH_MESH = pytest.mark.parametrize(("made", "size"), MESHES.values(), ids=MESHES)


def silhouettes(clip, faces, size):
    with served_by("torch"):
        seen = fragments_of(clip, faces, nearest_faces(clip, faces, size))
    return crossing_edges(clip, faces, *faces_across(faces), seen.face, seen.depth)


# Numpy, in which Triton's interpreter computes, tells of every number that is none.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")


@pytest.mark.parametrize("kernels", TRITON_AND_C)
@EACH_MESH
def test_each_kernel_sees_the_faces_that_plain_torch_sees(made, size, kernels):
    """In every pixel, those included that lie on an edge, at a border of the picture or in two faces as near."""
    found = []
    for by in ("torch", kernels):
        with served_by(by):
            found.append(nearest_faces(*made, size))
    assert torch.equal(*found)
    assert found[0].shape == (2, size, size)
    assert bool((found[0] >= 0).any()) == bool(len(made[1]))


@pytest.mark.parametrize("kernels", TRITON_AND_C)
@EACH_MESH
def test_each_kernel_finds_the_silhouettes_that_plain_torch_finds(made, size, kernels):
    found = []
    for by in ("torch", kernels):
        with served_by(by):
            found.append(silhouettes(*made, size))
    assert torch.equal(*found)
    assert found[0].shape == (2, 2, size, size)


@EACH
def test_what_is_seen_is_the_same_whatever_the_order_of_faces(kernels):
    (clip, faces), size = MESHES["small"]
    order = torch.randperm(len(faces), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with served_by(kernels):
        one, other = nearest_faces(clip, faces, size), nearest_faces(clip, faces[order], size)
    assert torch.equal(one, torch.where(other < 0, -1, order[other.clamp_min(0)]))


@EACH
def test_of_faces_as_near_as_each_other_the_first_is_seen(kernels):
    (clip, faces), size = MESHES["large"]
    with served_by(kernels):
        once, thrice = nearest_faces(clip, faces, size), nearest_faces(clip, torch.cat([faces, faces, faces]), size)
    assert torch.equal(once, thrice)


@EACH
def test_there_is_no_gap_along_edges_through_pixels_centres(kernels):
    """A square of 8 by 8 cells about a picture of 8 by 8 pixels, its vertices in the pixels' centres and beyond."""
    places = torch.arange(-1, 9, device=DEVICE) * 0.25 - 0.875
    grid = torch.cartesian_prod(places, places)
    clip = torch.cat([grid, torch.ones_like(grid)], -1)[None]
    corner = (torch.arange(9, device=DEVICE)[:, None] * 10 + torch.arange(9, device=DEVICE)).flatten()
    faces = torch.cat([torch.stack([corner, corner + 1, corner + 11], -1), torch.stack([corner, corner + 11, corner + 10], -1)])
    with served_by(kernels):
        assert (nearest_faces(clip, faces, 8) >= 0).all()


def test_plain_torch_sees_the_same_with_less_memory(monkeypatch):
    for made, size in MESHES.values():
        with served_by("torch"):
            whole = nearest_faces(*made, size)
            monkeypatch.setattr(rasterization, "NUM_AT_ONCE", 37)
            assert torch.equal(nearest_faces(*made, size), whole)
            monkeypatch.undo()


def test_faces_are_decided_in_single_precision_whatever_is_asked_for():
    (clip, faces), size = MESHES["small"]
    assert torch.equal(nearest_faces(clip, faces, size), nearest_faces(clip.double(), faces, size))
