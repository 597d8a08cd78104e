"""Folders in the layout of MVDream's conversion to diffusers: loaded as they are, asked in their own world, refused if damaged."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_vsd.cameras import Cameras, look_at_origin, turntable
from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.priors.attention import use_attention
from dist_vsd.priors.camera_pose import MVDREAM_WORLD, camera_pose
from dist_vsd.priors.multi_view import MultiViewPrior
from dist_vsd.priors.prior import eps_pretrain
from dist_vsd.priors.stable_diffusion import StableDiffusionPrior
from dist_vsd.priors.table import load_prior, prior_row
from dist_vsd.training.state import build_state
from dist_vsd.training.update import update
from tests.tiny_pipelines import write_mvdream


@pytest.fixture(scope="module")
def mvdream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mvdream") / "pipeline"
    return folder, write_mvdream(folder)


def camera(azimuth_deg, elevation_deg):
    return look_at_origin(*(torch.tensor([value]) for value in (azimuth_deg, elevation_deg, 3.0, 40.0)))


@pytest.mark.parametrize(
    ("azimuth_deg", "elevation_deg", "place"), [(0.0, 0.0, (0, -1, 0)), (90.0, 0.0, (1, 0, 0)), (0.0, 90.0, (0, 0, 1))]
)
def test_poses_are_told_in_mvdreams_world(azimuth_deg, elevation_deg, place):
    """There the front looks along -y, and a camera at azimuth 90 stands at +x; z is up. Cameras look along their own -z."""
    pose = camera_pose(camera(azimuth_deg, elevation_deg), torch.tensor(MVDREAM_WORLD)).reshape(4, 4)
    expected = torch.tensor(place, dtype=torch.float32)
    torch.testing.assert_close(pose[:3, 3], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(pose[:3, 2], expected, rtol=0, atol=1e-6)
    assert float(torch.linalg.det(pose[:3, :3])) == pytest.approx(1.0, abs=1e-5)


@torch.no_grad()
def test_its_unet_is_diffusers_own_with_cameras_and_joint_attention(mvdream):
    folder, unet = mvdream
    prior = load_prior(str(folder))
    assert isinstance(prior, MultiViewPrior)
    assert prior_row(str(folder)).views_per_shot == 4
    for name, weight in unet.state_dict().items():
        assert torch.equal(prior.unet.state_dict()[name], weight), name
    x_t, t = torch.randn(8, *prior.latent_shape, generator=torch.Generator().manual_seed(0)), torch.full((8,), 600)
    cameras, y = Cameras.cat([turntable(4, 15.0, 3.0, 40.0)] * 2), prior.embed(["a duck"] * 8)
    use_attention(unet, "sdpa", 4)
    pose = camera_pose(cameras, torch.tensor(MVDREAM_WORLD))
    expected = unet(x_t, t, y.cond.tokens, class_labels=pose).sample
    torch.testing.assert_close(prior.predict(x_t, t, y.cond, cameras), expected, rtol=1e-4, atol=1e-5)
    # Its guidance tells both branches the camera.
    uncond = unet(x_t, t, y.uncond.tokens, class_labels=pose).sample
    found = eps_pretrain(prior, x_t, t, y, 7.5, cameras)
    torch.testing.assert_close(found, uncond + 7.5 * (expected - uncond), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("objective", [{}, {"objective": "sds", "sds": {"form": "x_0", "rescale": 0.5}}], ids=["vsd", "its own sds"])
def test_an_update_goes_through_it(mvdream, objective):
    settings = objective | {
        "prompt": "a green duck", "prior": str(mvdream[0]), "render_size": 16, "num_updates": 2,
        "field": {"num_samples": 8, "dense_grid": {"resolutions": [6]}},
    }  # fmt: skip
    config = merge(load_preset("embedded"), settings, "test")
    state = build_state(config, Layout.of(1, num_views=4, views_per_shot=4), torch.device("cpu"))
    before = [parameter.clone() for parameter in state.particles[0].theta.parameters()]
    report = update(state, 0)
    assert all(torch.isfinite(torch.as_tensor(v)).all() for values in report.figures.values() for v in values)
    assert any(not torch.equal(a, b) for a, b in zip(before, state.particles[0].theta.parameters(), strict=True))


def config_with(folder, **changes):
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without(folder, start):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if not name.startswith(start)}, file)


DAMAGES = {
    "no camera": (lambda folder: without(folder, "camera_embed"), "camera_embed.0.weight) takes 0 numbers"),
    "no camera in the configuration": (lambda folder: config_with(folder, camera_dim=None), "configuration lacks camera_dim"),
    "ImageDream": (lambda folder: config_with(folder, ip_dim=16), "is ImageDream"),
    "a missing block": (lambda folder: without(folder, "middle_block.1"), "lacks"),
    "another width": (lambda folder: config_with(folder, context_dim=32), "reads texts of width 32"),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(mvdream, tmp_path, damage, says):
    folder = shutil.copytree(mvdream[0], tmp_path / "prior")
    damage(folder)
    with pytest.raises(ValueError, match=says.replace("(", r"\(").replace(")", r"\)")) as refused:
        load_prior(str(folder))
    assert "\n" not in str(refused.value)


def test_it_is_no_prior_of_single_views(mvdream):
    with pytest.raises(ValueError, match="scores 4 view"):
        StableDiffusionPrior.load(str(mvdream[0]))
