"""The theory without any weights: with exact scores VSD samples the prior, SDS collapses, and more steps of phi come nearer to that.

Under a variance preserving process and under a rectified flow alike.

The prior is a mixture of four Gaussians in the plane, g is the identity, and particles are points. The gradients are the product's own
(objectives/); eps_phi is the exact score of the cloud, or a small network that learns it.
"""

import math

import pytest
import torch

from dist_vsd.diffusion.process import RectifiedFlow, add_noise, eps_from_score
from dist_vsd.diffusion.timesteps import TimestepConfig
from dist_vsd.lab.flow import flow, gradient
from dist_vsd.lab.measures import Target, entropy, mean_distance
from dist_vsd.lab.mixtures import load_mixture
from dist_vsd.lab.scores import ExactScore, LearnedScore
from dist_vsd.lab.settings import Settings, Variant
from dist_vsd.priors.gaussian_mixture import GaussianMixturePrior, mixture_score

SETTINGS = Settings(num_particles=256, num_updates=700)
SHORT = Settings(num_particles=128, num_updates=300)
FEW = Settings(num_particles=16, num_updates=5)
FOUR = load_mixture("four_gaussians")
FLOW = load_mixture("four_gaussians", RectifiedFlow(shift=3.0))
both = pytest.mark.parametrize("prior", [FOUR, FLOW], ids=["variance_preserving", "rectified_flow"])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def target():
    return Target(FOUR)


def learned(steps, order="theta_then_phi"):
    return Variant("vsd", "learned", steps, order)


def last(variant, settings=SETTINGS, seed=0, prior=FOUR):
    """Return the particles after the last update."""
    return [theta for _, theta, _ in flow(prior, variant, settings, seed)][-1]


def spread_in_mode(theta):
    """Return the standard deviation of the particles about the mean of those in the same mode."""
    modes = FOUR.component_log_densities(theta).argmax(-1)
    groups = [theta[modes == mode] for mode in modes.unique()]
    return float(torch.cat([group - group.mean(0) for group in groups]).square().mean().sqrt())


def fresh_distance(target, num_particles):
    """Return what n samples of the target are away from it on average, E|Y - Y'| / n."""
    return target.distance_within / num_particles


def mean_gap(target, variant):
    """Return how far phi is from the exact eps of the cloud, on average over a run but its start."""
    looks = range(30, SHORT.num_updates, 30)
    gaps = [target.phi_gap(theta, phi) for update, theta, phi in flow(FOUR, variant, SHORT, 0) if update in looks]
    return sum(gaps) / len(gaps)


@both
def test_vsd_with_the_exact_score_is_nearer_to_the_target_than_fresh_samples(prior):
    theta, target = last(Variant("vsd", "exact"), prior=prior), Target(prior)
    # Seeds 0 to 2: 0.13, 0.40 and 0.07 of it; under the flow 0.13, 0.22 and 0.19.
    assert target.energy_distance(theta) < 0.8 * fresh_distance(target, 256)
    # Three standard errors of a mode's weight of independent samples are 0.09.
    torch.testing.assert_close(target.mode_weights(theta), FOUR.weights, atol=0.06, rtol=0)
    assert target.in_mode_std(theta) == pytest.approx(0.35, abs=0.03)
    assert target.kl_noised(theta) < 0.02  # SDS: above 0.5


@both
def test_sds_collapses_onto_the_heavy_modes(prior):
    theta, target = last(Variant("sds"), Settings(num_particles=256, num_updates=1500), prior=prior), Target(prior)
    assert target.energy_distance(theta) > 0.3  # twenty times that of fresh samples
    assert float(target.mode_weights(theta)[2:].max()) < 0.05  # the target's are 0.2 and 0.1
    assert spread_in_mode(theta) < 0.25  # the target's is 0.35
    assert target.kl(theta) > 2  # of fresh samples: below 0.2


def test_denoising_shrinks_each_mode(target):
    theta = last(Variant("denoising"))
    assert target.in_mode_std(theta) < 0.2  # the target's is 0.35
    assert target.kl(theta) > 2


def test_vsd_with_a_learned_score_comes_near_the_target(target):
    theta = last(learned(2))
    assert target.energy_distance(theta) < 2 * fresh_distance(target, 256)  # SDS: above 20 times that
    assert target.in_mode_std(theta) == pytest.approx(0.35, abs=0.06)


def test_vsd_with_a_learned_velocity_comes_near_the_target_under_a_flow():
    theta, target = last(learned(2), Settings(num_particles=128, num_updates=500), prior=FLOW), Target(FLOW)
    assert target.energy_distance(theta) < 1.5 * fresh_distance(target, 128)  # seeds 0 to 2: 0.54, 0.39 and 0.25 of it; SDS: above 40


@pytest.mark.parametrize("order", ["theta_then_phi", "phi_then_theta"])
def test_more_phi_steps_an_update_bring_a_learned_phi_nearer_to_the_exact_one(target, order):
    one, five = (mean_gap(target, learned(steps, order)) for steps in (1, 5))
    assert five < 0.75 * one  # seeds 0 to 2: 0.34 to 0.44


def test_in_the_order_of_algorithm_1_phi_learns_what_the_step_of_theta_has_used():
    for order in ("theta_then_phi", "phi_then_theta"):
        (_, start, phi), (_, after, _) = ((u, theta.clone(), phi) for u, theta, phi in flow(FOUR, learned(1, order), FEW, 0) if u < 2)
        x_t, t = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)), torch.full((16,), 300)
        assert not torch.equal(phi(x_t, t), FOUR.eps(x_t, t))  # phi has learned something in either order, but when?
        # At first phi is the prior, and the VSD gradient zero: theta rests until phi has made its first step.
        assert torch.equal(start, after) == (order == "theta_then_phi")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@both
def test_the_exact_score_is_that_of_point_masses_noised(prior):
    exact, theta = ExactScore(prior.process), numbers(20, 2)
    exact.follow(theta, 0)
    x_t, t = 2 * numbers(30, 2, seed=1), prior.process.draw_t((torch.arange(30).double() + 0.5) / 30, 0.02, 1.0)
    alpha_t, sigma_t = prior.process.alpha_sigma(t, x_t)
    weights = torch.full((20,), 1 / 20, dtype=torch.float64)
    score = mixture_score(x_t, alpha_t[..., None] * theta, sigma_t.square()[..., None].expand(-1, 20, 1), weights)
    torch.testing.assert_close(exact(x_t, t), eps_from_score(score, sigma_t), rtol=1e-10, atol=1e-10)  # the same sums in fp64


@pytest.mark.parametrize("weighting", ["sigma_squared", "uniform"])
def test_the_gradient_of_vsd_under_a_flow_is_the_weighted_difference_of_velocities_times_one_minus_s(weighting):
    variances = torch.full((4,), 0.35**2, dtype=torch.float64)
    wide = GaussianMixturePrior(FLOW.means.double(), variances, FLOW.weights.double(), FLOW.process)
    theta, x_0, eps = numbers(20, 2), numbers(9, 2, seed=1), numbers(9, 2, seed=2)
    s = torch.tensor([0.01, 0.05, 0.2, 0.4, 0.5, 0.7, 0.9, 0.99, 1.0], dtype=torch.float64)
    phi = ExactScore(wide.process)
    phi.follow(theta, 0)
    found = gradient(wide, "vsd", phi, x_0, s, eps, Settings(timesteps=TimestepConfig(weighting=weighting)))

    s = s[:, None]
    x_t = (1 - s) * x_0 + s * eps
    # The prior's velocity: in each mode x_0 and eps given x_t are normal, and the modes are weighted by how likely they made x_t.
    variance = (1 - s) ** 2 * 0.35**2 + s**2
    offset = x_t[:, None] - (1 - s)[..., None] * wide.means
    likely = (wide.weights.log() - offset.square().sum(-1) / (2 * variance) - variance.log()).softmax(-1)[..., None]
    expected_x_0 = (likely * (wide.means + ((1 - s) * 0.35**2 / variance)[..., None] * offset)).sum(1)
    v = (likely * (s / variance)[..., None] * offset).sum(1) - expected_x_0
    # The particles': v = (x_t - x_0) / s for each of them.
    way = x_t[:, None] - (1 - s)[..., None] * theta
    v_phi = (x_t - ((-way.square().sum(-1) / (2 * s**2)).softmax(-1)[..., None] * theta).sum(1)) / s
    w_t = s**2 if weighting == "sigma_squared" else 1.0
    # fp64; at s = 0.01 (x_t - x_0) / s loses two digits, and the square of it two more.
    torch.testing.assert_close(found, w_t * (1 - s) * (v - v_phi), rtol=1e-9, atol=1e-9)


def test_at_pure_noise_a_flow_has_finite_scores_that_are_the_noise():
    theta, x_t, end = numbers(20, 2).float(), numbers(9, 2, seed=1).float(), torch.ones(9)
    exact = ExactScore(FLOW.process)
    exact.follow(theta, 0)
    assert torch.equal(exact(x_t, end), x_t)
    assert torch.equal(LearnedScore(FLOW, 1, 1e-3, 0)(x_t, end), x_t)
    assert torch.equal(gradient(FLOW, "vsd", exact, theta[:9], end, x_t, SETTINGS), torch.zeros(9, 2))


def test_sds_is_vsd_of_a_single_particle():
    x_0, t, eps = torch.tensor([[0.3, -0.7]]), torch.tensor([300]), torch.tensor([[1.0, 0.5]])
    exact = ExactScore(FOUR.process)
    exact.follow(x_0, 0)
    vsd = gradient(FOUR, "vsd", exact, x_0, t, eps, SETTINGS)
    # (x_t - alpha x_0) / sigma loses a digit of fp32.
    torch.testing.assert_close(vsd, gradient(FOUR, "sds", exact, x_0, t, eps, SETTINGS), rtol=1e-5, atol=1e-6)


def test_denoising_is_the_derivative_of_the_weighted_loss():
    x_0, t, eps = torch.tensor([[0.3, -0.7]], dtype=torch.float64), torch.tensor([300]), torch.tensor([[1.0, 0.5]]).double()
    alpha_t, sigma_t = FOUR.process.alpha_sigma(t, x_0)
    wide = load_mixture("four_gaussians")
    wide.means, wide.weights, wide._variances = wide.means.double(), wide.weights.double(), wide._variances.double()

    def loss(x_0):
        return float(sigma_t.square() * (wide.eps(add_noise(x_0, eps, alpha_t, sigma_t), t) - eps).square().sum())

    steps = 1e-6 * torch.eye(2, dtype=torch.float64)
    differences = torch.tensor([[(loss(x_0 + step) - loss(x_0 - step)) / 2e-6 for step in steps]])
    torch.testing.assert_close(gradient(wide, "denoising", None, x_0, t, eps, SETTINGS), differences.double(), rtol=1e-6, atol=1e-6)


def test_a_seed_gives_the_same_particles_to_the_bit_and_another_others():
    assert torch.equal(last(learned(1), FEW), last(learned(1), FEW))
    assert not torch.equal(last(learned(1), FEW), last(learned(1), FEW, seed=1))


def test_energy_distance_and_kl_of_fresh_samples_are_what_theory_says(target):
    samples = [FOUR.sample(512, torch.Generator().manual_seed(i)) for i in range(20)]
    distances = torch.tensor([target.energy_distance(sample) for sample in samples])
    # Their spread is about their mean; four standard errors over 20 sets.
    assert float(distances.mean()) == pytest.approx(fresh_distance(target, 512), rel=0.9)
    assert sum(target.kl(sample) for sample in samples) / 20 == pytest.approx(0.0, abs=0.1)  # the estimate's bias at n = 512
    assert 0 < sum(target.kl_noised(sample) for sample in samples) / 20 < 0.02


def test_entropy_and_mean_distance_by_closed_forms():
    normal = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    assert entropy(3 * normal) == pytest.approx(math.log(2 * math.pi * math.e) + 2 * math.log(3), abs=0.06)  # 1.3 / sqrt(4,000) x 3
    assert entropy(torch.zeros(10, 2)) == -math.inf
    square = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert mean_distance(square, square) == pytest.approx(2.5)  # 0, 5, 5, 0
