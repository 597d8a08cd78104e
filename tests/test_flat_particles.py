"""particles/latent.py and siren.py, and runs of 2D particles by every objective that serves them."""

import pytest
import torch
from PIL import Image

from dist_vsd.cameras import turntable
from dist_vsd.config import RunConfig
from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.distributed.random import keyed_generator
from dist_vsd.particles.image import ImageParticle
from dist_vsd.particles.latent import LatentParticle
from dist_vsd.particles.particle import Render
from dist_vsd.particles.particle_configs import ImageConfig, LatentConfig, SirenConfig
from dist_vsd.particles.siren import SirenParticle
from dist_vsd.priors.clip import ClipScorer
from dist_vsd.priors.embedded.recognition import recognize
from dist_vsd.priors.sampling import sample
from dist_vsd.priors.stable_diffusion import StableDiffusionPrior
from dist_vsd.training.state import build_state
from dist_vsd.training.theta_step import reconstruction_loss
from dist_vsd.training.update import update

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def cameras(count):
    return turntable(count, 0.0, 2.0, 40.0)


def state_of(preset, **settings):
    config = merge(load_preset(preset), {"prompt": "a red ball"} | settings, "test")
    return build_state(config, Layout.of(config.num_particles), CPU)


def test_a_latent_particle_shows_its_own_numbers_to_every_camera():
    theta = LatentParticle(LatentConfig(channels=4, resolution=8, initial_std=2.0), generator())
    assert torch.equal(theta.render(cameras(3), 64).image, theta.x_0.expand(3, 4, 8, 8))
    assert float(theta.x_0.detach().std()) == pytest.approx(2.0, rel=0.2)
    theta.become(torch.ones(4, 8, 8))
    assert bool((theta.render(cameras(1), 64).image == 1).all())


def test_a_picture_that_is_put_in_is_the_picture_that_is_shown():
    theta, picture = ImageParticle(ImageConfig(resolution=16), generator()), torch.rand(3, 16, 16, generator=generator(1))
    theta.become(picture)
    torch.testing.assert_close(theta.render(cameras(1), 16).image[0].detach(), picture.clamp(1e-3, 1 - 1e-3))


def test_a_sirens_activations_keep_their_spread_from_layer_to_layer():
    """With the paper's start each hidden layer's sine has a standard deviation near sqrt(1/2), whatever the depth."""
    theta = SirenParticle(SirenConfig(hidden_width=256, num_hidden=5, first_omega=30.0), generator())
    hidden, spreads = torch.rand(4096, 2, generator=generator(1)) * 2 - 1, []
    with torch.no_grad():
        for index, layer in enumerate(theta.layers[:-1]):
            hidden = torch.sin((theta.config.first_omega if index == 0 else theta.config.hidden_omega) * layer(hidden))
            spreads.append(float(hidden.std()))
    assert all(0.6 < spread < 0.8 for spread in spreads)


def test_a_siren_draws_the_same_picture_at_every_size():
    theta = SirenParticle(SirenConfig(), generator())
    coarse, fine = (theta.render(cameras(1), size).image for size in (16, 48))
    torch.testing.assert_close(fine[..., 1::3, 1::3], coarse)  # the middle pixel of three by three stands where the coarse one does


def test_a_siren_learns_a_sharp_picture():
    """A disc with an edge: a network of smooth activations of this size would leave it blurred."""
    theta = SirenParticle(SirenConfig(resolution=32), generator())
    axis = torch.arange(32) - 15.5
    disc = (torch.hypot(axis[:, None], axis[None]) < 10).float().expand(1, 3, 32, 32)
    optimizer = torch.optim.Adam(theta.parameter_groups())
    for _ in range(300):
        optimizer.zero_grad()
        loss = (theta.render(cameras(1), 32).image - disc).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.01  # 20 dB


@pytest.mark.parametrize("preset", ["image", "latent", "siren"])
@pytest.mark.parametrize("objective", ["vsd", "sds", "denoising", "clip"])
def test_every_objective_moves_every_particle_that_it_can_serve(preset, objective):
    if (preset, objective) == ("latent", "clip"):
        with pytest.raises(ValueError, match="objective clip can't serve representation latent: use --representation radiance_field or"):
            merge(load_preset(preset), {"objective": objective}, "test")
        return
    state = state_of(preset, objective=objective, num_particles=2)
    before = [[p.detach().clone() for p in particle.theta.parameters()] for particle in state.particles]
    report = update(state, 0)
    for particle, old in zip(state.particles, before, strict=True):
        assert all(not torch.equal(p, q) for p, q in zip(particle.theta.parameters(), old, strict=True))
    assert ("phi/loss" in report.means()) == (objective == "vsd")


@pytest.mark.parametrize("representation", ["radiance_field", "siren"])
def test_what_is_sampled_needs_a_particle_that_can_hold_a_picture(representation):
    with pytest.raises(ValueError, match=f"objective ancestral can't serve representation {representation}: use --representation image or"):
        merge(RunConfig(), {"objective": "ancestral", "representation": representation}, "test")


@pytest.mark.parametrize("preset", ["latent", "image"])
def test_an_ancestral_particle_is_a_sample_of_the_prior_with_noise_of_its_own(preset):
    state = state_of(preset, objective="ancestral", num_particles=2, ancestral={"sampler": "dpmsolver++", "num_steps": 20})
    update(state, 0)
    noise = torch.stack([torch.randn(4, 16, 16, generator=keyed_generator(0, "ancestral", particle=i)) for i in (0, 1)])
    y = state.prior.embed(["a red ball"])[[0, 0]]
    x_0 = sample(state.prior, y, noise, 20, 7.5, "dpmsolver++")
    shown = torch.cat([particle.theta.render(cameras(1), 64).image for particle in state.particles])
    expected = x_0 if preset == "latent" else state.prior.decode(x_0).clamp(1e-3, 1 - 1e-3)
    torch.testing.assert_close(shown.detach(), expected, rtol=1e-4, atol=1e-4)  # batches of one and two round differently
    pictures = state.prior.decode(x_0)
    assert recognize(ClipScorer.load(), pictures) == [("ball", "red")] * 2


def test_a_flat_particle_is_asked_for_without_view_words_and_phi_is_told_no_pose():
    state = state_of("latent", num_particles=2)
    assert state.prompt.by_view is None
    poses = []
    forward = state.phi.score.camera_embedding.forward
    state.phi.score.camera_embedding.forward = lambda pose: (poses.append(pose), forward(pose))[1]
    update(state, 0)
    assert len(poses) == 2
    assert not any(pose.any() for pose in poses)


def test_a_run_of_flat_particles_ends_with_their_pictures(tmp_path):
    from dist_vsd.cli import main

    arguments = ["train", "a red ball", "--preset", "latent", "--objective", "ancestral", "--num-particles", "3"]
    assert main([*arguments, "--wandb.mode", "disabled", "--run-dir", str(tmp_path / "run")]) == 0
    assert [Image.open(tmp_path / "run" / "export" / f"picture_{i:04d}.png").size for i in range(3)] == [(64, 64)] * 3
    assert main(["render", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("picture_*.png"))) == 3


def test_the_reconstruction_loss_pulls_a_picture_to_what_its_latent_stands_for():
    """Its gradient is 2 (image - D(E(image))) / values, and nothing flows through the networks."""
    embedded = StableDiffusionPrior.load("embedded")
    image = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x_0 = embedded.encode(image).detach()
    loss = reconstruction_loss(embedded, [Render(row[None], torch.ones(1, 1, 96, 96), row[None], {}) for row in image], x_0)
    loss.backward()
    decoded = torch.nn.functional.interpolate(embedded.decode(x_0), (96, 96), mode="bilinear", antialias=True)
    torch.testing.assert_close(image.grad, 2 * (image.detach() - decoded) / image[0].numel())


def test_a_picture_under_vsd_stays_near_what_its_latent_stands_for():
    """Without the loss it becomes one that only the encoder takes for the prompt."""
    residuals = []
    for weight in (0.0, load_preset("siren").regularization.reconstruction):
        state = state_of("siren", num_particles=2, regularization={"reconstruction": weight})
        for index in range(60):
            update(state, index)
        with torch.no_grad():
            image = torch.cat([particle.theta.render(cameras(1), 64).image for particle in state.particles])
            residuals.append(float((image - state.prior.decode(state.prior.encode(image))).square().mean()))
    assert residuals[1] < 0.5 * residuals[0]
