"""Dream Fields (Jain et al. 2022): CLIP on random crops over random backgrounds, and a reward for transparency up to a target.

Settings are named as in the authors' configuration; lengths are fractions of CLIP's picture.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dist_vsd.objectives.objective import Batch, Cotangents, Objective
from dist_vsd.objectives.objective_configs import ClipConfig
from dist_vsd.priors.clip import ClipScorer
from dist_vsd.priors.clip_folder import EMBEDDED_CLIP_FOLDER
from dist_vsd.priors.prior import Prior

if TYPE_CHECKING:
    from dist_vsd.config import RunConfig
    from dist_vsd.score.score import Score

CHECKERBOARD_SQUARES = 8
FOURIER_DECAY, FOURIER_STD = 1.5, 0.2  # of the smooth noise: amplitude falls as frequency^-1.5
MOST_BLUR, BLUR_KERNEL = 10 / 224, 15 / 224  # standard deviation and width of the Gaussian
# Targets of opacity hold for an object that takes as much of the picture as at this distance and focal length (in half heights).
TARGET_DISTANCE, TARGET_FOCAL_LENGTH = 4.0, 1.2**0.5 / math.tan(0.6911 / 2)


class DreamFields(Objective):
    """Dream Fields' objective (see Objective): CLIP's similarity, without view words, and in 3D the transmittance loss."""

    asks_prior = False

    def __init__(self, config: RunConfig, prior: Prior, score: Score | None) -> None:
        self._config, self._is_flat, self._size = config.clip, config.is_flat, config.render_size
        folder = Path(config.clip.model) if config.clip.model else EMBEDDED_CLIP_FOLDER
        self._scorer = ClipScorer.load(folder, prior.device)
        self._text = self._scorer.embed_texts([config.prompt])[0]

    def draw(self, num_views: int, generator: torch.Generator) -> dict[str, Tensor]:
        """See Objective: the crops of each view, and what lies behind them."""
        views = [draw_crops(self._size, self._scorer.image_size, self._config, generator) for _ in range(num_views)]
        corners, backgrounds = zip(*views, strict=True)
        return {"corner": torch.stack(corners), "background": torch.stack(backgrounds)}

    def cotangents(self, batch: Batch) -> Cotangents:
        """See Objective; the one root is the loss, summed over the renders."""
        foreground, opacity = (torch.cat([getattr(render, name) for render in batch.renders]) for name in ("foreground", "opacity"))
        drawn = {name: torch.cat([shot[name] for shot in batch.drawn]) for name in ("corner", "background")}
        loss = clip_loss(self._scorer, self._text, foreground, opacity, self._config, drawn["corner"], drawn["background"])
        figures = {"clip/crop_similarity": -loss.detach().mean()}
        if not self._is_flat:
            cameras = batch.cameras
            target = target_opacity(self._config, batch.progress, cameras.c2w[:, :3, 3].norm(dim=1), cameras.fov)
            loss = loss + self._config.transmittance_weight * transmittance_loss(opacity, target)
        return Cotangents([(loss.sum(), None)], figures)


def clip_loss(
    scorer: ClipScorer, text: Tensor, foreground: Tensor, opacity: Tensor, config: ClipConfig, corners: Tensor, backgrounds: Tensor
) -> Tensor:
    """Return -cos(CLIP image, CLIP text) of each render, averaged over its augmented crops (Dream Fields).

    Args:
        scorer: CLIP.
        text: (D,) unit vector of the prompt.
        foreground: (B, 3, H, W) colours premultiplied by opacity.
        opacity: (B, 1, H, W).
        config: number and size of crops.
        corners, backgrounds: (B, ...) of draw_crops for each render.

    Returns:
        (B,); the gradient flows to the renders.
    """
    rows = zip(foreground, opacity, corners, backgrounds, strict=True)
    crops = [augmented(*row, config.crop_fraction) for row in rows]
    cosines = scorer.embed_images(torch.cat(crops)) @ text
    return -cosines.reshape(len(foreground), config.num_crops).mean(1)


def crop_side(fraction: float, render_size: int) -> int:
    """Return the side of a crop, pixels."""
    return max(1, round(fraction * render_size))


def draw_crops(render_size: int, size: int, config: ClipConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw where the crops of a render begin, and what lies behind each.

    Args:
        render_size: height and width of the render, pixels.
        size: of CLIP's pictures, pixels.
        config: number and size of crops.
        generator: on the CPU.

    Returns:
        (num_crops, 2) rows and columns of their first pixels, and (num_crops, 3, size, size) backgrounds.
    """
    most = render_size - crop_side(config.crop_fraction, render_size) + 1
    corners = [torch.randint(most, (2,), generator=generator) for _ in range(config.num_crops)]
    backgrounds = [random_background(size, generator) for _ in range(config.num_crops)]
    return torch.stack(corners), torch.stack(backgrounds)


def augmented(foreground: Tensor, opacity: Tensor, corner: Tensor, background: Tensor, crop_fraction: float) -> Tensor:
    """Return random crops of one render, resized, each composited on a random background.

    Args:
        foreground: (3, H, W) premultiplied colours.
        opacity: (1, H, W).
        corner, background: of draw_crops.
        crop_fraction: side of a crop over that of the render.

    Returns:
        (num_crops, 3, size, size), as large as the backgrounds.
    """
    layers = torch.cat([foreground, opacity])
    within = torch.arange(crop_side(crop_fraction, layers.shape[-1]), device=layers.device)
    rows, columns = (corner[:, axis, None] + within for axis in (0, 1))
    crops = layers[:, rows[:, :, None], columns[:, None, :]].movedim(1, 0)  # by indices: corners are on the device, and stay there
    resized = nn.functional.interpolate(crops, background.shape[-2:], mode="bilinear", antialias=True)
    return resized[:, :3] + (1 - resized[:, 3:]) * background.to(resized)


def random_background(size: int, generator: torch.Generator) -> Tensor:
    """Draw (3, size, size) noise, checkerboard or smooth Fourier noise, each a third of the time, and blur it by a random width."""
    kind = int(torch.randint(3, (1,), generator=generator))
    draw = (uniform_noise, checkerboard, fourier_noise)[kind]
    std = MOST_BLUR * size * float(torch.rand(1, generator=generator))
    return blurred(draw(size, generator), std, max(1, round(BLUR_KERNEL * size / 2)))


def uniform_noise(size: int, generator: torch.Generator) -> Tensor:
    """Draw every value from U[0, 1)."""
    return torch.rand(3, size, size, generator=generator)


def checkerboard(size: int, generator: torch.Generator) -> Tensor:
    """Draw two colours for the squares of a board."""
    colors = torch.rand(2, 3, generator=generator)
    square = torch.arange(size) * CHECKERBOARD_SQUARES // size
    return colors[(square[:, None] + square[None]) % 2].permute(2, 0, 1)


def fourier_noise(size: int, generator: torch.Generator) -> Tensor:
    """Draw smooth noise: Gaussian coefficients whose size falls with frequency, through a sigmoid."""
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None])
    scale = frequency.clamp_min(1 / size) ** -FOURIER_DECAY
    parts = torch.randn(2, 3, *frequency.shape, generator=generator)
    picture = torch.fft.irfft2(torch.complex(parts[0], parts[1]) * scale, s=(size, size))
    return (picture / picture.std() * 4 * FOURIER_STD).sigmoid()


def blurred(picture: Tensor, std: float, radius: int) -> Tensor:
    """Convolve (3, H, W) with a Gaussian of ``std`` pixels cut off at ``radius``, edges repeated."""
    if std < 0.05:  # narrower than a twentieth of a pixel: the kernel is a point
        return picture
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets / std) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    padded = nn.functional.pad(picture[None], (radius,) * 4, mode="replicate")
    rows = nn.functional.conv2d(padded, kernel[..., None, :], groups=3)
    return nn.functional.conv2d(rows, kernel[..., :, None], groups=3)[0]


def transmittance_loss(opacity: Tensor, target_opacity: Tensor) -> Tensor:
    """Return -min(1 - target, mean transmittance) of each render (Dream Fields).

    Args:
        opacity: (B, 1, H, W).
        target_opacity: (B,); at or below it nothing pulls.

    Returns:
        (B,); the gradient flows to the opacity.
    """
    return -torch.minimum(1 - target_opacity, 1 - opacity.flatten(1).mean(1))


def target_opacity(config: ClipConfig, progress: float, distance: Tensor, fov: Tensor) -> Tensor:
    """Return the target of the mean opacity of each render.

    It falls exponentially from opacity_start to opacity_end, and is scaled by the area that an object takes in the picture,
    (focal length / distance)^2 relative to Dream Fields' own cameras.

    Args:
        config: the two targets.
        progress: of the run, in [0, 1).
        distance: (B,) of the cameras, scene units.
        fov: (B,) vertical field of view, radians.

    Returns:
        (B,) in (0, 1].
    """
    done = min(1.0, progress / max(config.opacity_anneal, 1e-9))
    target = config.opacity_start * math.exp(done * math.log(config.opacity_end / config.opacity_start))
    magnification = (TARGET_DISTANCE / distance) / (TARGET_FOCAL_LENGTH * torch.tan(fov / 2))
    return (target * magnification.square()).clamp(max=1.0)
