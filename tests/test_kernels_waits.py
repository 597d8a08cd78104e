"""The kernels in plain torch, on a device on paper (paper_device.py): nothing waits for the device, nothing is copied to or from it."""

import pytest
import torch

from dist_vsd.kernels.compositing import accumulate, composite, visible
from dist_vsd.kernels.hash_encoding import hash_encode
from dist_vsd.kernels.sampling import Samples, sample_occupied
from dist_vsd.rasterization.rasterize import antialias, interpolate, rasterize, vertex_normals
from tests.each_kernel import random_cells, random_rays, random_samples
from tests.meshes import ball, cameras
from tests.paper_device import DEVICE, OnPaper, recording


def on_paper(samples):
    tensors = [getattr(samples, name).cpu().to(DEVICE) for name in ("ray", "t", "delta", "first")]
    return Samples(*tensors, samples.num_samples, samples.rays_per_image)


def waits_and_copies(record):
    return dict(record.waits), dict(record.copies)


def test_samples_are_chosen_without_a_wait():
    with OnPaper():
        *rays, cells = (values.cpu().to(DEVICE) for values in (*random_rays(40), random_cells()))
        with recording() as record:
            samples = sample_occupied(*rays, cells, 1.0, 12, 20, 60)
            samples.points(*rays[:2])
        assert waits_and_copies(record) == ({}, {})
        assert record.num_operations > 0
        expected = sample_occupied(*(values.cpu() for values in (*rays, cells)), 1.0, 12, 20, 60)
        assert torch.equal(samples.t.cpu(), expected.t)


def test_compositing_and_leaving_out_what_is_hidden_wait_for_nothing():
    with OnPaper():
        samples = on_paper(random_samples())
        density, color = (torch.ones(shape, device=DEVICE, requires_grad=True) for shape in ((1000,), (1000, 3)))
        with recording() as record:
            seen = visible(density.detach(), samples, 100)
            found = composite(density, color, samples)
            spread = accumulate(found.weights * samples.t, samples)
            (found.color.sum() + found.opacity.sum() + spread.sum()).backward()
        assert waits_and_copies(record) == ({}, {})
        assert seen.t.shape == (200,)
        assert density.grad.abs().sum().item() > 0


@pytest.mark.parametrize("counted", [False, True])
def test_the_hash_encoding_waits_for_nothing_and_copies_no_constants(counted):
    with OnPaper():
        points, count = torch.rand(50, 3, device=DEVICE), torch.full((), 30, device=DEVICE, dtype=torch.int32)
        tables = [torch.rand(size, 2, device=DEVICE).requires_grad_() for size in (27, 64)]
        with recording() as record:
            hash_encode(points, tables, (2, 16), count if counted else None).sum().backward()
        assert waits_and_copies(record) == ({}, {})
        assert all(table.grad.abs().sum().item() > 0 for table in tables)


def test_an_exact_number_of_samples_is_one_wait():
    with OnPaper():
        *rays, cells = (values.cpu().to(DEVICE) for values in (*random_rays(40), random_cells()))
        with recording() as record:
            sample_occupied(*rays, cells, 1.0, 12, 20, None)
        assert (sum(record.waits.values()), dict(record.copies)) == (1, {})


def picture_of(vertices, faces, views):
    """A ball's normals, antialiased, and the gradient of their squares and depths."""
    seen = rasterize(vertices, faces, views, 16)
    picture = antialias(interpolate(vertex_normals(vertices, faces), seen), seen)
    (picture.square().sum() + seen.depth.sum()).backward()
    return picture.detach(), vertices.grad


def test_a_picture_of_a_mesh_and_its_gradient_are_one_wait_in_plain_torch():
    """For the number of pixels in faces' boxes, which Triton's kernel does not ask; all else has the shape of the picture."""
    vertices, faces = ball(2, torch.float32)
    views = cameras((0.0, 100.0), dtype=torch.float32)
    expected = picture_of((0.8 * vertices).requires_grad_(), faces, views)
    with OnPaper():
        there = (0.8 * vertices).to(DEVICE).requires_grad_(), faces.to(DEVICE), views.to(DEVICE)
        with recording() as record:
            found = picture_of(*there)
        assert (dict(record.copies), sum(record.waits.values())) == ({}, 1)
        assert next(iter(record.waits)).startswith("kernels/rasterization.py")
        found = [values.cpu() for values in found]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # sums over pixels in fp32, in another order


def test_on_a_device_a_face_that_is_no_number_spoils_no_other_ones_gradient():
    """There every pixel is computed, also where nothing is seen: as if it were face 0, and then left out."""
    vertices, faces = ball(1, torch.float32)
    views = cameras((0.0,), dtype=torch.float32)
    with OnPaper():
        spoilt = torch.cat([torch.full((3, 3), torch.nan), 0.8 * vertices]).to(DEVICE).requires_grad_()
        seen = rasterize(spoilt, torch.cat([torch.tensor([[0, 1, 2]]), faces + 3]).to(DEVICE), views.to(DEVICE), 12)
        (antialias(interpolate(spoilt, seen), seen).square().sum() + seen.depth.sum()).backward()
        found = spoilt.grad.cpu()[3:]
    assert found.isfinite().all()
    assert found.abs().sum() > 1
