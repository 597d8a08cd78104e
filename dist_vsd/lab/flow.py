"""The flow of particles under a method of the lineage: n points in D dimensions, g the identity, Adam.

The same seed gives the same start and the same t and eps at every update, whatever the method.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dist_vsd.diffusion.process import add_noise
from dist_vsd.diffusion.timesteps import range_at, timestep_weight
from dist_vsd.distributed.random import keyed_generator
from dist_vsd.errors import RunFailed
from dist_vsd.lab.scores import CloudScore, ExactScore, LearnedScore
from dist_vsd.lab.settings import Settings, Variant
from dist_vsd.objectives.denoising import denoising_gradient
from dist_vsd.objectives.sds import sds_gradient
from dist_vsd.objectives.vsd import vsd_gradient
from dist_vsd.priors.gaussian_mixture import GaussianMixturePrior
from dist_vsd.priors.prior import eps_pretrain


def flow(prior: GaussianMixturePrior, variant: Variant, settings: Settings, seed: int) -> Iterator[tuple[int, Tensor, CloudScore]]:
    """Run particles, and stop before each update and after the last to show them.

    Yields:
        The number of updates done, the (n, D) particles, and phi (which methods without one don't ask). A caller that keeps the
        particles copies them.

    Raises:
        RunFailed: a particle is no longer finite.
    """
    process, num_updates = prior.process, settings.num_updates
    shape = (settings.num_particles, prior.num_dimensions)
    theta = settings.start_std * torch.randn(shape, generator=keyed_generator(seed, "initialize_theta"))
    adam = torch.optim.Adam([theta], lr=settings.lr, betas=(0.9, 0.99))
    phi = LearnedScore(prior, variant.phi_steps, settings.phi_lr, seed) if variant.phi == "learned" else ExactScore(process)
    phi_first = variant.order != "theta_then_phi"
    for update in range(num_updates):
        yield update, theta, phi
        progress = update / num_updates
        adam.param_groups[0]["lr"] = settings.lr * (1.0 - progress * (1.0 - settings.final_lr_fraction))
        renders = theta.clone()
        if phi_first:
            phi.follow(renders, update)
        uniform = torch.rand(shape[0], generator=keyed_generator(seed, "timestep", update=update))
        t = process.draw_t(uniform, *range_at(settings.timesteps, progress))
        eps = torch.randn(shape, generator=keyed_generator(seed, "noise", update=update))
        theta.grad = gradient(prior, variant.method, phi, renders, t, eps, settings)
        adam.step()
        if not phi_first:
            phi.follow(renders, update)
        if not theta.isfinite().all():
            raise RunFailed(f"{variant.label}: a particle is not finite after update {update + 1}: lower --lr")
    yield num_updates, theta, phi


@torch.no_grad()
def gradient(
    prior: GaussianMixturePrior, method: str, phi: CloudScore, x_0: Tensor, t: Tensor, eps: Tensor, settings: Settings
) -> Tensor:
    """Return a method's gradient with respect to x_0, by the formulas of objectives/.

    Args:
        prior: the mixture.
        method: one of METHODS.
        phi: eps_phi; only vsd asks it.
        x_0: (n, D) particles.
        t: (n,) times of the process.
        eps: (n, D) noise.
        settings: for w(t) and s.

    Raises:
        ValueError: s is not 1: a mixture has no unconditional branch.
    """
    alpha_t, sigma_t = prior.process.alpha_sigma(t, x_0)
    w_t = timestep_weight(settings.timesteps.weighting, alpha_t, sigma_t)

    def predict(x_t: Tensor) -> Tensor:
        return eps_pretrain(prior, x_t, t, prior.no_text(len(x_t)), settings.guidance_scale)

    if method == "denoising":
        return denoising_gradient(predict, x_0, eps, alpha_t, sigma_t, w_t)
    x_t = add_noise(x_0, eps, alpha_t, sigma_t)
    if method == "sds":
        return sds_gradient(predict(x_t), eps, w_t)
    return vsd_gradient(predict(x_t), phi(x_t, t), w_t)
