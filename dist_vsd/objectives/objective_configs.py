"""Settings of the objectives that have some of their own. Apart from their code, so that reading a configuration imports no networks."""

from __future__ import annotations

import dataclasses

from dist_vsd.priors.samplers import SAMPLERS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Dream Fields' losses."""

    model: str = ""
    """Folder of a transformers CLIPModel in safetensors; empty: the embedded CLIP."""
    num_crops: int = 8
    """Random crops of each render, each over a background of its own."""
    crop_fraction: float = 154 / 168
    """Side of a crop over the render's."""
    transmittance_weight: float = 0.5
    """Of the transmittance loss beside the similarity."""
    opacity_start: float = 0.5
    """Target of the mean opacity at first (a higher one is pulled down; a lower one is left alone) ..."""
    opacity_end: float = 0.1
    """... and later, at Dream Fields' cameras; it is scaled by the area that an object takes at the run's."""
    opacity_anneal: float = 0.05
    """Fraction of num_updates over which the target falls, exponentially."""

    def __post_init__(self) -> None:
        if self.num_crops < 1:
            raise ValueError(f"clip.num_crops must be at least 1, got {self.num_crops}: raise --clip.num-crops")
        if not 0.0 < self.crop_fraction <= 1.0:
            raise ValueError(f"clip.crop_fraction must be in (0, 1], got {self.crop_fraction}: change --clip.crop-fraction")
        if not 0.0 < self.opacity_end <= self.opacity_start <= 1.0:
            raise ValueError(
                "clip.opacity_start and opacity_end must satisfy 0 < end <= start <= 1, got "
                f"{self.opacity_start} and {self.opacity_end}: change --clip.opacity-*"
            )
        if not 0.0 <= self.opacity_anneal <= 1.0:
            raise ValueError(f"clip.opacity_anneal must be in [0, 1], got {self.opacity_anneal}: change --clip.opacity-anneal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SdsConfig:
    """What SDS follows: the noise, as DreamFusion's, or x_0, as MVDream's."""

    form: str = "eps"
    """eps: w(t) (eps_pretrain - eps). x_0: x_0 less the prior's estimate of it, with no other weight."""
    rescale: float = 0.0
    """Of the x_0 form: how far the guided estimate is taken back to the spread of the one without guidance, 0 to 1; MVDream: 0.5."""

    def __post_init__(self) -> None:
        if self.form not in ("eps", "x_0"):
            raise ValueError(f"sds.form must be eps or x_0, got {self.form!r}: change --sds.form")
        if not 0.0 <= self.rescale <= 1.0:
            raise ValueError(f"sds.rescale must be in [0, 1], got {self.rescale}: change --sds.rescale")
        if self.rescale and self.form != "x_0":
            raise ValueError(f"sds.rescale {self.rescale:g} is of the x_0 form: add --sds.form x_0, or drop --sds.rescale")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AncestralConfig:
    """How a particle is drawn from the prior."""

    sampler: str = ""
    """ddim (Song et al. 2021) or dpmsolver++ (Lu et al. 2022); of a rectified flow euler; empty: ddim, or euler of a flow."""
    num_steps: int = 50
    """Steps of the sampler."""

    def __post_init__(self) -> None:
        if self.sampler not in ("", *SAMPLERS):
            raise ValueError(f"ancestral.sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}: change --ancestral.sampler")
        if self.num_steps < 1:
            raise ValueError(f"ancestral.num_steps must be at least 1, got {self.num_steps}: raise --ancestral.num-steps")
