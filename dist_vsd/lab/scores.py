"""eps_phi of a cloud of particles: exact, or learned by a small network."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from dist_vsd.diffusion.process import Process, add_noise
from dist_vsd.distributed.random import keyed_generator
from dist_vsd.objectives.vsd import phi_loss
from dist_vsd.priors.gaussian_mixture import GaussianMixturePrior

WIDTH = 128
TIME_FREQUENCY = 6.0
LEAST_ALPHA = 1e-6  # below it fp32 has lost in x_t where a particle lies


class CloudScore(Protocol):
    """eps_phi(x_t, t) of the particles, and how it follows them."""

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in (B, D) noised particles at (B,) times of the process."""
        ...

    def follow(self, theta: Tensor, update: int) -> None:
        """Take in where the (n, D) particles are at an update."""
        ...


class ExactScore:
    """The exact eps of the particles' own noised distribution, a mixture with a point mass at each particle.

    By Tweedie's formula eps_phi = (x_t - alpha_t E[x_0 | x_t]) / sigma_t, where E[x_0 | x_t] averages the particles, each weighted by how
    likely it made x_t. It is what phi would be after infinitely many steps, with a network that can represent everything.
    """

    def __init__(self, process: Process) -> None:
        self.process = process
        self.theta = torch.empty(0, 0)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in (B, D) noised particles at (B,) times of the process."""
        alpha_t, sigma_t = self.process.alpha_sigma(t, x_t)
        expected_x_0 = cloud_logits(x_t, self.theta, alpha_t, sigma_t).softmax(-1) @ self.theta
        return (x_t - alpha_t * expected_x_0) / sigma_t

    def follow(self, theta: Tensor, update: int) -> None:
        """Take the particles themselves."""
        self.theta = theta


def cloud_logits(x_t: Tensor, theta: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Return -||x_t - alpha_t theta_j||^2 / (2 sigma_t^2) of (B, D) points and (n, D) particles, (B, n).

    At alpha_t = 0, the end of a rectified flow, all particles are as likely to have made x_t.
    """
    alpha_t = alpha_t.clamp_min(LEAST_ALPHA)
    # Matrix products would lose the small differences between neighbours at low noise.
    distance = torch.cdist(x_t / alpha_t, theta, compute_mode="donot_use_mm_for_euclid_dist")
    return -0.5 * (distance * alpha_t / sigma_t).square()


class LearnedScore:
    """A small network of x_t and t as eps_phi: an offset of what the prior predicts, zero at first, as LoRA's.

    Args:
        prior: the pretrained model.
        num_steps: of phi an update, each on fresh t' and eps' for all particles.
        lr: of AdamW.
        seed: of the network's start and its draws.
    """

    def __init__(self, prior: GaussianMixturePrior, num_steps: int, lr: float, seed: int) -> None:
        self.prior, self.num_steps, self.seed = prior, num_steps, seed
        self.net = _network(2 * prior.num_dimensions + 4, prior.num_dimensions, keyed_generator(seed, "initialize_phi"))
        self.adam = torch.optim.AdamW(self.net.parameters(), lr=lr)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in (B, D) noised particles at (B,) times of the process; the gradient flows to phi."""
        return self.prior.process.eps(self.predict(x_t, t), x_t, t)

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return what the process's networks predict, (B, D) as x_t; the gradient flows to phi."""
        _, sigma_t = self.prior.process.alpha_sigma(t, x_t)
        wave = TIME_FREQUENCY * sigma_t
        inputs = torch.cat([x_t, sigma_t * x_t, sigma_t, sigma_t.square(), wave.sin(), wave.cos()], -1)
        return self.prior.predict(x_t, t) + self.net(inputs)

    def follow(self, theta: Tensor, update: int) -> None:
        """Make ``num_steps`` steps of phi on the particles (ProlificDreamer, equation 8; t' over the whole range)."""
        process = self.prior.process
        for step in range(self.num_steps):
            uniform = torch.rand(len(theta), generator=keyed_generator(self.seed, "phi_timestep", update=update, step=step))
            t = process.draw_t(uniform, 0.0, 1.0)
            eps = torch.randn(theta.shape, generator=keyed_generator(self.seed, "phi_noise", update=update, step=step))
            x_t = add_noise(theta, eps, *process.alpha_sigma(t, theta))
            self.adam.zero_grad()
            with torch.enable_grad():
                phi_loss(process.error(self.predict(x_t, t), theta, x_t, eps, t, loss="")).mean().backward()
            self.adam.step()


def _network(num_inputs: int, num_outputs: int, generator: torch.Generator) -> nn.Sequential:
    """Return an MLP of two hidden layers whose output is zero at first, drawn from a generator."""
    linears = [nn.Linear(num_inputs, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, num_outputs)]
    for linear in linears:
        nn.init.zeros_(linear.bias)
        nn.init.kaiming_uniform_(linear.weight, generator=generator)
    nn.init.zeros_(linears[-1].weight)
    return nn.Sequential(linears[0], nn.SiLU(), linears[1], nn.SiLU(), linears[2])
