"""A mixture of Gaussians as a prior: its noised densities, and so its scores, are known exactly. For the laboratory and its theory.

If x_0 ~ sum_k w_k N(mu_k, Sigma_k), then x_t ~ sum_k w_k N(alpha_t mu_k, alpha_t^2 Sigma_k + sigma_t^2 I). With Sigma_k = U diag(v) U^T
the noised covariance has the same axes U and the variances alpha_t^2 v + sigma_t^2, so one decomposition serves every t, whatever the
process.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.diffusion.process import Process, eps_from_score
from dist_vsd.priors.prior import Text, TextEmbeddings

WEIGHT_TOLERANCE = 1e-5  # of the weights' sum: what fp32 and decimal fractions lose
SYMMETRY_TOLERANCE = 1e-6  # of a covariance, relative to its largest entry


def component_log_densities(x: Tensor, means: Tensor, variances: Tensor, weights: Tensor, axes: Tensor | None = None) -> Tensor:
    """Return log(w_k N(x; mu_k, U_k diag(v_k) U_k^T)) of each component.

    Args:
        x: (B, D) points.
        means: (B or 1, K, D).
        variances: (B or 1, K, D) along the axes, or (B or 1, K, 1) of isotropic components.
        weights: (K,), summing to 1.
        axes: (K, D, D), the columns of U_k; None: those of the coordinates.

    Returns:
        (B, K); the gradient flows to x.
    """
    difference = _along(x[:, None] - means, axes)
    num_dimensions = x.shape[-1]
    log_determinant = variances.log().sum(-1) * (num_dimensions // variances.shape[-1])
    mahalanobis_squared = (difference.square() / variances).sum(-1)
    return weights.log() - 0.5 * (mahalanobis_squared + log_determinant + num_dimensions * math.log(2 * math.pi))


def mixture_score(x: Tensor, means: Tensor, variances: Tensor, weights: Tensor, axes: Tensor | None = None) -> Tensor:
    """Return grad log p of a mixture: the components' scores, weighted by how likely each made x.

    Args:
        x, means, variances, weights, axes: as for component_log_densities.

    Returns:
        (B, D); the gradient flows to x.
    """
    responsibilities = torch.softmax(component_log_densities(x, means, variances, weights, axes), -1)
    return (responsibilities[..., None] * component_scores(x, means, variances, axes)).sum(1)


def component_scores(x: Tensor, means: Tensor, variances: Tensor, axes: Tensor | None = None) -> Tensor:
    """Return the gradient of log N(x; mu_k, U_k diag(v_k) U_k^T) of each component, (B, K, D); arguments as above."""
    scores = _along(means - x[:, None], axes) / variances
    return scores if axes is None else torch.einsum("bke,kde->bkd", scores, axes)


def _along(vectors: Tensor, axes: Tensor | None) -> Tensor:
    """Return the coordinates of (B, K, D) vectors along each component's axes."""
    return vectors if axes is None else torch.einsum("bkd,kde->bke", vectors, axes)


class GaussianMixturePrior:
    """A prior in D dimensions with exact scores.

    It has no text and no network: predict ignores ``y`` and cameras, and there is no unconditional branch to guide from.

    Args:
        means: (K, D); everything is computed in its dtype.
        covariances: (K, D, D), or (K,) variances of isotropic components.
        weights: (K,) above 0, summing to 1.
        process: how samples are noised, and what predict() returns.

    Raises:
        ValueError: shapes that don't match, weights that don't sum to 1, covariances that are not symmetric and positive definite.
    """

    image_size, views_per_shot, knows_cameras, camera_is_guided = 0, 1, False, True

    def __init__(self, means: Tensor, covariances: Tensor, weights: Tensor, process: Process) -> None:
        _check_shapes(means, covariances, weights)
        _check_weights(weights)
        self.means, self.weights, self.process = means, weights.to(means), process
        self.covariances = covariances.to(means)
        if covariances.ndim == 1:
            _check_positive(covariances[:, None])
            self._variances, self._axes = self.covariances[:, None], None
        else:
            _check_symmetric(covariances)
            variances, axes = torch.linalg.eigh(covariances.double())
            _check_positive(variances)
            self._variances, self._axes = variances.to(means), axes.to(means)

    @property
    def num_dimensions(self) -> int:
        """D."""
        return self.means.shape[1]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(D,)."""
        return (self.num_dimensions,)

    @property
    def device(self) -> torch.device:
        """Where the mixture is."""
        return self.means.device

    @staticmethod
    def no_text(count: int) -> TextEmbeddings:
        """Return what eps_pretrain takes for texts: B empty ones without an unconditional branch, so that only s = 1 is accepted."""
        return TextEmbeddings(Text(torch.empty(count, 0, 0)), None)

    def encode(self, image: Tensor) -> Tensor:
        """Return the samples themselves."""
        return image

    def decode(self, x_0: Tensor) -> Tensor:
        """Return the samples themselves."""
        return x_0

    def predict(self, x_t: Tensor, t: Tensor, y: Text | None = None, cameras: Cameras | None = None) -> Tensor:
        """Return what a perfect network of the process predicts for (B, D) points at (B,) times; the gradient flows to x_t.

        That is the expectation, given x_t, of what it is trained to predict; of a rectified flow the velocity E[eps - x_0 | x_t].
        """
        return self.process.target(self.expected_x_0(x_t, t), self.eps(x_t, t), t)

    def eps(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the exact eps = -sigma_t grad log p_t(x_t) = E[eps | x_t], (B, D) as x_t; the gradient flows to x_t."""
        score = mixture_score(x_t, *self._noised(x_t, t), self.weights, self._axes)
        return eps_from_score(score, self.process.alpha_sigma(t, x_t)[1])

    def expected_x_0(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return E[x_0 | x_t], (B, D) as x_t; the gradient flows to x_t.

        Of component k it is mu_k - alpha_t Sigma_k grad log N_k(x_t): Tweedie's formula without its division by alpha_t.
        """
        means, variances = self._noised(x_t, t)
        alpha_t = self.process.alpha_sigma(t, x_t)[0][..., None]
        responsibilities = torch.softmax(component_log_densities(x_t, means, variances, self.weights, self._axes), -1)
        scores = component_scores(x_t, means, variances, self._axes)
        spread = self._variances * scores if self._axes is None else torch.einsum("kde,bke->bkd", self.covariances, scores)
        return (responsibilities[..., None] * (self.means - alpha_t * spread)).sum(1)

    def component_log_densities(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Return (B, K) log(w_k N_k(x)) of (B, D) points, of p_0, or of p_t at (B,) times; the gradient flows to x."""
        return component_log_densities(x, *self._noised(x, t), self.weights, self._axes)

    def log_density(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Return (B,) log p_0 of (B, D) points, or log p_t at (B,) times; the gradient flows to x."""
        return self.component_log_densities(x, t).logsumexp(-1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw (count, D) samples of p_0."""
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.num_dimensions, generator=generator, dtype=self.means.dtype)
        scaled = self._variances.sqrt()[k] * noise
        return self.means[k] + (scaled if self._axes is None else torch.einsum("bde,be->bd", self._axes[k], scaled))

    def marginal(self, coordinates: tuple[int, ...]) -> GaussianMixturePrior:
        """Return the mixture of some coordinates alone."""
        index = list(coordinates)
        covariances = self.covariances if self._axes is None else self.covariances[:, index][:, :, index]
        return GaussianMixturePrior(self.means[:, index], covariances, self.weights, self.process)

    def _noised(self, x: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return means (B or 1, K, D) and variances (B or 1, K, D or 1) of p_t, or of p_0."""
        if t is None:
            return self.means[None], self._variances[None]
        alpha_t, sigma_t = (value[..., None] for value in self.process.alpha_sigma(t, x))
        return alpha_t * self.means, alpha_t.square() * self._variances + sigma_t.square()


def _check_shapes(means: Tensor, covariances: Tensor, weights: Tensor) -> None:
    if means.ndim != 2 or 0 in means.shape:
        raise ValueError(f"a mixture's means must have the shape (K, D) with at least one component, got {tuple(means.shape)}: change them")
    num_components, num_dimensions = means.shape
    if weights.shape != (num_components,):
        raise ValueError(f"a mixture of {num_components} mean(s) needs as many weights, got the shape {tuple(weights.shape)}: change them")
    shapes = ((num_components,), (num_components, num_dimensions, num_dimensions))
    if covariances.shape not in shapes:
        got = tuple(covariances.shape)
        raise ValueError(f"a mixture's covariances must have the shape {shapes[0]} or {shapes[1]}, got {got}: change them")
    for name, values in (("means", means), ("covariances", covariances), ("weights", weights)):
        if not values.isfinite().all():
            raise ValueError(f"a mixture's {name} must be finite numbers, got {values[~values.isfinite()][0]:g}: change it")


def _check_weights(weights: Tensor) -> None:
    if weights.min() <= 0:
        raise ValueError(f"a mixture's weights must be above 0, got {weights.min():g}: leave that component out")
    total = float(weights.double().sum())
    if abs(total - 1.0) > WEIGHT_TOLERANCE:
        raise ValueError(f"a mixture's weights must sum to 1, got {total:g}: divide each by {total:g}")


def _check_symmetric(covariances: Tensor) -> None:
    for k, covariance in enumerate(covariances):
        if (covariance - covariance.T).abs().max() > SYMMETRY_TOLERANCE * covariance.abs().max():
            raise ValueError(f"a mixture's covariances must be symmetric, got {covariance.tolist()} for component {k}: change it")


def _check_positive(variances: Tensor) -> None:
    """Refuse (K, D or 1) variances along the components' axes that are not positive."""
    least, k = variances.min(-1).values.min(0)
    if least <= 0:
        raise ValueError(
            f"a mixture's covariances must be positive definite, got the variance {least:g} along an axis of component {int(k)}: raise it"
        )
