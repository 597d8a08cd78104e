"""Options of an update: particles that take turns, phi's pass used twice, phi's own checkpoint, scenes."""

import pytest
import torch

from dist_vsd.cameras import look_at_origin
from dist_vsd.config_files import load_preset, merge
from dist_vsd.diffusion.process import RectifiedFlow, add_noise
from dist_vsd.distributed.layout import Layout, Shot
from dist_vsd.particles.particle_configs import RadianceFieldConfig
from dist_vsd.particles.radiance_field import RadianceField
from dist_vsd.particles.volume_rendering import Rays
from dist_vsd.score.camera_embedding import pose_of
from dist_vsd.training.draws import draw_noise, draw_phi_t, draw_t
from dist_vsd.training.state import build_state
from dist_vsd.training.update import update
from dist_vsd.training.work import choose_particles
from tests.runs import gradients_taken
from tests.samples import samples_on

CPU = torch.device("cpu")


def config_of(**settings):
    return merge(load_preset("latent"), {"prompt": "a duck", "num_particles": 6} | settings, "test")


def state_of(**settings):
    config = config_of(**settings)
    return build_state(config, Layout.of(config.num_particles), CPU)


def test_the_chosen_particles_are_as_many_as_asked_the_smaller_set_in_the_larger_and_all_have_their_turns():
    config = config_of(particles={"theta_batch": 2, "phi_batch": 4})
    draws = [choose_particles(config, 6, index) for index in range(60)]
    assert all(len(chosen.theta) == 2 and len(chosen.phi) == 4 and chosen.theta < chosen.phi for chosen in draws)
    assert set().union(*(chosen.theta for chosen in draws)) == set(range(6))
    assert len({chosen.theta for chosen in draws}) > 10
    assert choose_particles(config, 6, 3) == draws[3]


def test_only_the_chosen_particles_take_a_step():
    state = state_of(particles={"theta_batch": 2, "phi_batch": 4})
    before = [particle.theta.x_0.detach().clone() for particle in state.particles]
    chosen = choose_particles(state.config, 6, 0)
    update(state, 0)
    moved = {p.id for p, old in zip(state.particles, before, strict=True) if not torch.equal(p.theta.x_0, old)}
    assert moved == chosen.theta


def test_phi_learns_from_the_chosen_renders_alone():
    """Other particles may be anything: phi's step does not change."""
    states = [state_of(particles={"theta_batch": 1, "phi_batch": 3}) for _ in range(2)]
    chosen = choose_particles(states[0].config, 6, 0)
    for particle in states[1].particles:
        if particle.id not in chosen.phi:
            particle.theta.x_0.data.fill_(9.0)
    losses = [update(state, 0).means()["phi/loss"] for state in states]
    assert losses[0] == losses[1]
    one, other = (state.phi.tensors() for state in states)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_reused_pass_gives_the_score_of_a_pass_of_its_own_and_phi_the_gradient_at_the_particles_own_noise():
    plain, reused = state_of(score={"pose_dropout": 0.0}), state_of(score={"pose_dropout": 0.0, "reuse_pass": True})
    for state in (plain, reused):
        perturbed = torch.Generator().manual_seed(5)
        for parameter in state.phi.score.phi().values():
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=perturbed))
    taken = {}
    parameters = reused.phi.score.phi()
    reused.phi.optimizer.register_step_pre_hook(lambda *_: taken.update({n: p.grad.clone() for n, p in parameters.items()}))
    x_0 = torch.cat([particle.theta.x_0.detach().clone() for particle in reused.particles])
    pulls = [[gradients_taken(particle) for particle in state.particles] for state in (plain, reused)]
    for state in (plain, reused):
        update(state, 0)
    for one, other in zip(*pulls, strict=True):
        torch.testing.assert_close(one["x_0"], other["x_0"], rtol=1e-4, atol=1e-5)  # fp32

    # The same loss by hand, on a phi that has not moved.
    fresh = state_of()
    perturbed = torch.Generator().manual_seed(5)
    for parameter in fresh.phi.score.phi().values():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=perturbed))
    shots = [Shot(i, 0) for i in range(6)]
    t = torch.cat([draw_t(fresh.config, shot, 0, 0.0, fresh.prior.process) for shot in shots])
    eps = torch.cat([draw_noise(fresh.config, "noise", shot, 0, x_0.shape[1:]) for shot in shots])
    x_t = add_noise(x_0, eps, *fresh.prior.process.alpha_sigma(t, x_0))
    predicted = fresh.phi.score(x_t, t, fresh.prompt.plain.cond.expand(6), torch.zeros(6, 16))
    (predicted - eps).square().mean().backward()
    for name, parameter in fresh.phi.score.phi().items():
        if parameter.grad is not None:
            torch.testing.assert_close(taken[name], parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("reuse_pass", [False, True])
@torch.no_grad()
def test_an_update_under_a_rectified_flow_pulls_by_velocities_and_teaches_phi_the_velocity(reuse_pass):
    """The UNet knows nothing of a flow; that is nothing to the update, which takes its output for a velocity."""
    state = state_of(score={"pose_dropout": 0.0, "reuse_pass": reuse_pass}, micro_batch_size=6)
    prior, score, shots = state.prior, state.phi.score, [Shot(i, 0) for i in range(6)]
    prior.process = score.process = process = RectifiedFlow()
    for index, parameter in enumerate(score.phi().values()):
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    x_0 = torch.cat([particle.theta.x_0.clone() for particle in state.particles])
    s = torch.cat([draw_t(state.config, shot, 0, 0.0, process) for shot in shots])
    eps = torch.cat([draw_noise(state.config, "noise", shot, 0, x_0.shape[1:]) for shot in shots])
    x_t, y = add_noise(x_0, eps, *process.alpha_sigma(s, x_0)), state.prompt.plain.expand(6)
    v_phi = score(x_t, s, y.cond, torch.zeros(6, 16))
    uncond, cond = prior.predict(x_t, s, y.uncond), prior.predict(x_t, s, y.cond)
    weight = (s**2 * (1 - s)).view(6, 1, 1, 1)
    expected = weight * (uncond + state.config.guidance_scale * (cond - uncond) - v_phi)
    if not reuse_pass:
        s = torch.cat([draw_phi_t(state.config, shot, 0, 0, process) for shot in shots])
        eps = torch.cat([draw_noise(state.config, "phi_noise", shot, 0, x_0.shape[1:]) for shot in shots])
        x_t = add_noise(x_0, eps, *process.alpha_sigma(s, x_0))
        v_phi = score(x_t, s, y.cond, torch.zeros(6, 16))
    pulls = [gradients_taken(particle) for particle in state.particles]
    with torch.enable_grad():
        report = update(state, 0)
    for pull, gradient in zip(pulls, expected, strict=True):
        torch.testing.assert_close(pull["x_0"][0], gradient, rtol=1e-4, atol=1e-5)  # fp32
    assert report.means()["phi/loss"] == pytest.approx(float((v_phi - (eps - x_0)).square().mean()), rel=1e-4)
    (fractions, _), *_ = report.gaps
    assert torch.equal(fractions, torch.cat([draw_t(state.config, shot, 0, 0.0, process) for shot in shots]))


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"score": {"reuse_pass": True, "steps_per_update": 2}}, "score.reuse_pass has one pass of phi an update"),
        ({"score": {"reuse_pass": True, "entropy_weight": 0.5}}, "score.reuse_pass asks phi once"),
        ({"score": {"entropy_weight": 0.5, "camera": "none"}}, "score.entropy_weight wants a phi that is trained with and without"),
        ({"score": {"entropy_weight": 1.5}}, r"score.entropy_weight must be in \[0, 1\], got 1.5"),
        ({"score": {"loss": "x"}}, "score.loss must be one of eps, v, got 'x'"),
        ({"score": {"reuse_pass": True}, "particles": {"theta_batch": 1}}, "theta_batch and phi_batch must be equal, got 1 and 0"),
        ({"particles": {"theta_batch": 7}}, "particles.theta_batch must be between 0"),
        ({"particles": {"phi_batch": -1}}, "particles.phi_batch must be between 0"),
        ({"prompting": {"view_words": False, "perp_neg": True}}, "prompting.perp_neg and prompts for views need view words"),
        ({"clip": {"crop_fraction": 0}}, r"clip.crop_fraction must be in \(0, 1\], got 0"),
        ({"clip": {"opacity_start": 0.05}}, "0 < end <= start <= 1, got 0.05 and 0.1"),
        ({"ancestral": {"sampler": "heun"}}, "ancestral.sampler must be one of ddim, dpmsolver"),
        ({"siren": {"first_omega": 0}}, "siren.first_omega and hidden_omega must be above 0, got 0"),
        ({"latent": {"initial_std": -1}}, "latent.initial_std must be 0 or more, got -1"),
    ],
)
def test_options_that_contradict_each_other_are_refused_in_one_line(settings, rule):
    with pytest.raises(ValueError, match=rule):
        config_of(**settings)


def test_a_latent_of_another_shape_than_the_priors_is_refused_with_the_right_one():
    with pytest.raises(ValueError, match="the prior's latents have 4 channels of 16 x 16, got latent.channels 4 and latent.resolution 8"):
        state_of(latent={"resolution": 8})


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"sampler": "euler"}, r"sampler must be ddim or dpmsolver\+\+ for a prior with this process, got 'euler': change it, or leave it"),
        ({"num_steps": 999}, "num_steps must be between 1 and 998, got 999"),
    ],
)
def test_a_sampler_that_does_not_suit_the_priors_process_is_refused_before_the_run_begins(settings, rule):
    with pytest.raises(ValueError, match=rule):
        state_of(objective="ancestral", ancestral=settings)


def test_a_pose_is_told_as_a_matrix_as_spherical_coordinates_or_not_at_all():
    cameras = look_at_origin(torch.tensor([90.0]), torch.tensor([30.0]), torch.tensor([2.5]), torch.tensor([40.0]))
    assert torch.equal(pose_of(cameras, "c2w"), cameras.c2w.reshape(1, 16))
    torch.testing.assert_close(pose_of(cameras, "spherical"), torch.tensor([[torch.pi / 6, 1.0, 0.0, 2.5]]), rtol=1e-5, atol=1e-6)
    assert pose_of(cameras, "none").shape == (1, 0)


def test_a_phi_without_a_camera_has_no_embedding_of_it_and_alpha_scales_its_layers():
    state = state_of(score={"camera": "none", "rank": 4, "alpha": 8.0})
    assert not any("camera" in name for name in state.phi.score.phi())
    update(state, 0)
    layer = next(module for module in state.prior.unet.modules() if hasattr(module, "scaling"))
    assert layer.scaling == {"phi": 2.0}


def test_depth_variance_is_zero_for_a_thin_surface_and_that_of_the_weights_for_a_thick_one():
    weights, depth = torch.tensor([1.0, 0.25, 0.5, 0.25]), torch.tensor([2.0, 1.0, 2.0, 3.0])
    samples = samples_on(torch.tensor([0, 1, 1, 1]), depth, num_rays=3, num_samples=4)
    rays = Rays(torch.zeros(3, 3), torch.tensor([1.0, 1.0, 0.2]), weights, samples, torch.zeros(3))
    # The first ray meets one point, the second has a variance of 1/2, the third is hardly opaque and does not count.
    assert float(rays.depth_variance()) == pytest.approx(0.25)


def test_a_tracked_origin_follows_the_centre_of_mass_and_the_cameras_follow_it():
    field = RadianceField(RadianceFieldConfig(track_origin=True, origin_decay=0.0, occupancy_every=1), torch.Generator().manual_seed(0))
    cell = 2 / field.config.occupancy_resolution
    field.occupancy.occs.zero_()
    field.occupancy.occs.view(32, 32, 32)[24, 16, 16] = 3.0
    field._follow_center_of_mass()
    torch.testing.assert_close(field.origin, torch.tensor([24.5, 16.5, 16.5]) * cell - 1)
    camera = look_at_origin(torch.zeros(1), torch.zeros(1), torch.tensor([2.5]), torch.tensor([40.0]))
    followed = field.render(camera, 8).image
    field.origin.zero_()
    assert not torch.equal(field.render(camera, 8).image, followed)


def test_phi_on_another_checkpoint_than_the_teacher_leaves_the_teachers_unet_alone():
    state = state_of(score={"prior": "embedded"})
    assert state.phi.score.network is not state.prior.network
    assert not any("lora" in name for name, _ in state.prior.unet.named_parameters())
    shared = state_of()
    for one in (state, shared):
        update(one, 0)
    for one, other in zip(state.particles, shared.particles, strict=True):
        torch.testing.assert_close(one.theta.x_0.grad, other.theta.x_0.grad, rtol=1e-4, atol=1e-5)  # fp32
