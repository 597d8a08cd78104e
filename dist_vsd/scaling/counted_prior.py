"""What the passes of a prior cost at its real size, counted on shapes alone: for plans of what has no constants."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from dist_vsd.config_files import load_preset, merge
from dist_vsd.priors.architecture_names import PREFIX, preset_of, sizes_of_pictures
from dist_vsd.priors.table import load_prior
from dist_vsd.scaling.counted_work import CountedWork
from dist_vsd.scaling.shapes import shapes_alone
from dist_vsd.score.lora_score import LoraScore

META = torch.device("meta")


@dataclasses.dataclass(frozen=True)
class PriorWork:
    """GFLOP of one picture's passes, a multiplication with its addition being two; and what is held.

    Attributes:
        network_forward: of the frozen network.
        lora_forward_backward: of phi on it, forward and backward.
        encoder_forward, encoder_forward_backward: of the VAE's encoder.
        network_numbers, vae_numbers, phi_numbers: weights.
        image_size: of the picture, pixels.
    """

    network_forward: float
    lora_forward_backward: float
    encoder_forward: float
    encoder_forward_backward: float
    network_numbers: int
    vae_numbers: int
    phi_numbers: int
    image_size: int


def count_prior(size: str) -> PriorWork:
    """Count the passes of an architecture at the size of pictures and with the phi that its preset has.

    Args:
        size: of architecture_names.SIZES.
    """
    config = merge(load_preset(preset_of(size)), {"prior": PREFIX + size}, "plan")
    with shapes_alone():
        prior = load_prior(config.prior, META, torch.bfloat16, flow=config.flow)
        held = [sum(p.numel() for p in network.parameters()) for network in (prior.network, prior.vae)]
        side = min(prior.image_size, sizes_of_pictures(size))
        image, x_t = torch.empty(1, 3, side, side, device=META), torch.empty(1, *prior.latent_shape, device=META)
        t = prior.process.draw_t(torch.zeros(1), 0.5, 0.5).to(META)
        y, pose = prior.embed(["a prompt"]).cond, torch.empty(1, 16, device=META)
        plain = _gflop(lambda: prior.predict(x_t, t, y))
        encoder = _gflop(lambda: prior.encode(image)), _gflop(lambda: prior.encode(image.requires_grad_()).sum().backward())
        score = LoraScore(prior.network, config.score, torch.Generator())
        phi = _gflop(lambda: score(x_t, t, y, pose).sum().backward())
    return PriorWork(plain, phi, *encoder, *held, sum(p.numel() for p in score.phi().values()), side)


def _gflop(work: Callable[[], Tensor | None]) -> float:
    with CountedWork() as counted:
        work()
    return sum(counted.flop.values()) / 1e9
