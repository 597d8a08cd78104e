"""export/: files that other programs read, and a mesh whose radius is known in closed form."""

import math

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import trimesh

from dist_vsd.cameras import turntable
from dist_vsd.export.mesh import MeshOptions, make_mesh
from dist_vsd.export.mesh_files import write_ply, write_points
from dist_vsd.export.surface import field_surface, surface_points
from dist_vsd.export.turntable import render_views, write_grid, write_turntable
from dist_vsd.image_files import enlarge, tile, to_bytes, write_mp4, write_png
from dist_vsd.particles.iso_level import density_volume
from dist_vsd.particles.particle_configs import DenseGridConfig, RadianceFieldConfig
from dist_vsd.particles.radiance_field import RadianceField

RESOLUTION = 40
CELL = 2 / RESOLUTION
# The start's density is softplus(10 (1 - r / 0.5)): it is 5 where 10 (1 - r / 0.5) = ln(e^5 - 1).
THRESHOLD = 5.0
RADIUS = 0.5 * (1 - math.log(math.exp(THRESHOLD) - 1) / 10)


class ColouredBall(RadianceField):
    """The start's ball alone, coloured by direction: on the surface red grows with x, green with y, blue with z; no depth matters."""

    def forward(self, points):
        start = self.config.density_strength * (1 - points.norm(dim=-1) / self.config.density_radius)
        return torch.nn.functional.softplus(start), (torch.nn.functional.normalize(points, dim=-1) * RADIUS + 1) / 2


def ball(**options):
    config = RadianceFieldConfig(dense_grid=DenseGridConfig(resolutions=(4,)), num_samples=16, **options)
    return ColouredBall(config, torch.Generator().manual_seed(0))


def save(field, file, kind, resolution, threshold):
    """Write a field's surface as PLY; return the number of its vertices."""
    volume = density_volume(field, resolution)
    if kind == "points":
        points, colors = surface_points(field, volume, threshold)
        write_points(points, colors, file)
        return len(points)
    mesh = make_mesh(field_surface(field, volume, threshold), MeshOptions(texture_size=0))
    write_ply(mesh, file)
    return len(mesh.vertices)


def frames(count, height=32, width=48):
    """Frames of noise, no two alike: a GIF's writer may merge equal ones."""
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def read_mp4(file):
    return iio.imread(file, plugin="FFMPEG")


@pytest.mark.parametrize("count", [1, 5, 16])
def test_a_turntable_is_a_gif_an_mp4_and_a_png_with_every_frame(tmp_path, count):
    gif, mp4, png = write_turntable(frames(count), tmp_path / "deep" / "turntable_0000")
    assert [file.name for file in (gif, mp4, png)] == [f"turntable_0000.{suffix}" for suffix in ("gif", "mp4", "png")]
    assert iio.imread(gif, index=None).shape == (count, 32, 48, 3)
    assert read_mp4(mp4).shape == (count, 32, 48, 3)
    assert iio.imread(png).shape == (32, 48 * min(count, 8), 3)


@pytest.mark.parametrize("count", [8, 12, 20, 40])
def test_the_strip_shows_eight_frames_beginning_with_the_first(tmp_path, count):
    turn = frames(count, 16, 16)
    png = write_turntable(turn, tmp_path / "turn")[2]
    strip = iio.imread(png)
    assert strip.shape == (16, 8 * 16, 3)
    assert np.array_equal(strip[:, :16], to_bytes(turn)[0])


def test_a_gif_repeats_for_ever_at_twenty_frames_a_second(tmp_path):
    gif = write_turntable(frames(4), tmp_path / "turn")[0]
    metadata = iio.immeta(gif)
    assert metadata["duration"] == 50
    assert metadata["loop"] == 0


def test_an_mp4_of_odd_size_is_padded_by_one_white_pixel(tmp_path):
    write_mp4(torch.zeros(3, 3, 31, 45), tmp_path / "odd.mp4", 20.0)
    video = read_mp4(tmp_path / "odd.mp4")
    assert video.shape == (3, 32, 46, 3)
    assert video[:, :28, :40].mean() < 20  # black, but for H.264's rounding
    assert video[:, -1].mean() > 100


def test_a_png_holds_the_picture_to_the_bit(tmp_path):
    image = frames(1)
    write_png(image, tmp_path / "new" / "image.png")
    read = iio.imread(tmp_path / "new" / "image.png")
    assert np.array_equal(read, (image[0] * 255).round().permute(1, 2, 0).numpy().astype(np.uint8))


def test_bytes_round_to_the_nearest_and_stay_in_range():
    values = torch.tensor([-0.5, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 7.0]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_bytes(values)[0, 0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]


def test_tiles_are_rows_of_particles_and_columns_of_cameras(tmp_path):
    rows = [torch.full((3, 3, 2, 2), 0.2), torch.full((3, 3, 2, 2), 0.6)]
    rows[1][2] = 1.0
    grid = tile(rows)
    assert grid.shape == (1, 3, 4, 6)
    assert grid[0, 0, ::2, ::2].tolist() == [[pytest.approx(0.2)] * 3, [pytest.approx(0.6), pytest.approx(0.6), 1.0]]
    assert iio.imread(write_grid(rows, tmp_path / "grid.png")).shape == (4, 6, 3)
    assert torch.equal(enlarge(grid, 3)[..., ::3, ::3], grid)
    assert torch.equal(enlarge(grid, 3)[..., 2::3, 2::3], grid)


def test_views_are_what_the_particle_renders_from_each_camera():
    theta, cameras = ball(), turntable(3, 15.0, 3.0, 40.0)
    views = render_views(theta, cameras, 12)
    assert views.shape == (3, 3, 12, 12)
    assert not views.requires_grad
    assert torch.equal(views[1:2], theta.render(cameras[1:2], 12).image.clamp(0, 1))


def test_the_mesh_of_a_ball_has_the_radius_of_the_closed_form_and_faces_outwards(tmp_path):
    count = save(ball(), tmp_path / "new" / "ball.ply", "mesh", RESOLUTION, THRESHOLD)
    mesh = trimesh.load(tmp_path / "new" / "ball.ply")
    assert len(mesh.vertices) == count
    radii = np.linalg.norm(mesh.vertices, axis=1)
    # Marching cubes cut an edge by a straight line through two densities, which here fall linearly with the radius: what is left
    # is the sphere's bend over a cell, CELL^2 / (8 RADIUS) = CELL / 40.
    assert np.abs(radii - RADIUS).max() < CELL / 20
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    # A volume is positive when faces look outwards; a polyhedron with corners on a sphere is a little smaller than the ball.
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * RADIUS**3, rel=0.03)


def test_the_mesh_has_the_fields_colours_at_its_vertices(tmp_path):
    save(ball(), tmp_path / "ball.ply", "mesh", RESOLUTION, THRESHOLD)
    mesh = trimesh.load(tmp_path / "ball.ply", process=False)
    colors = np.asarray(mesh.visual.vertex_colors)[:, :3].astype(float)
    # Rounded to bytes; vertices lie off the sphere by its bend over a cell, and inwards is known to the bend of a cell's density.
    assert np.abs(colors - (mesh.vertices + 1) / 2 * 255).max() <= 1.0


def test_points_are_the_solid_cells_next_to_empty_ones_with_their_colours(tmp_path):
    count = save(ball(), tmp_path / "ball.ply", "points", RESOLUTION, THRESHOLD)
    cloud = trimesh.load(tmp_path / "ball.ply")
    assert len(cloud.vertices) == count
    radii = np.linalg.norm(cloud.vertices, axis=1)
    # Centres of cells inside the ball of which a neighbour's, one cell away, is outside.
    assert radii.max() < RADIUS
    assert radii.min() > RADIUS - CELL
    colors = np.asarray(cloud.colors)[:, :3].astype(float)
    expected = (cloud.vertices / radii[:, None] * RADIUS + 1) / 2 * 255
    assert np.abs(colors - expected).max() <= 1.0


@pytest.mark.parametrize("kind", ["mesh", "points"])
def test_an_object_that_fills_the_cube_is_closed_at_its_border(tmp_path, kind):
    # 10 (1 - r / 20) is above 9 in the whole cube: solid everywhere.
    count = save(ball(density_radius=20.0), tmp_path / "full.ply", kind, 10, THRESHOLD)
    if kind == "points":
        assert count == 10**3 - 8**3
    else:
        mesh = trimesh.load(tmp_path / "full.ply")
        assert mesh.is_watertight
        # The surface lies between the outermost cell centres, 0.9, and the empty centres beyond, 1.1.
        assert 1.8**3 < mesh.volume < 2.2**3


def test_a_wider_bound_scales_the_mesh_with_it(tmp_path):
    save(ball(bound=2.0, density_radius=1.0), tmp_path / "wide.ply", "mesh", RESOLUTION, THRESHOLD)
    radii = np.linalg.norm(trimesh.load(tmp_path / "wide.ply").vertices, axis=1)
    assert np.abs(radii - 2 * RADIUS).max() < 2 * CELL / 20


@pytest.mark.parametrize("kind", ["mesh", "points"])
def test_a_field_with_nothing_as_dense_as_the_threshold_is_refused_and_nothing_is_written(tmp_path, kind):
    # The densest cell centre is sqrt(3) / 2 cells from the middle: softplus(10 - 20 * 0.0433) = 9.13.
    with pytest.raises(ValueError, match="nothing is denser than --threshold 50: the densest cell has 9.13; lower it"):
        save(ball(), tmp_path / "new" / "empty.ply", kind, RESOLUTION, 50.0)
    assert not (tmp_path / "new").exists()
