"""An independent check of the update: its gradients equal autograd through a plain re-derivation, in fp64 on the embedded prior.

The re-derivation shares no code with the product but the frozen networks and the random numbers: it has its own rays,
trilinear interpolation, volume rendering, noising and guidance; LoRA is merged into the weights (W + B A) and the camera's
offset into a bias.
"""

import dataclasses
import math

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.func import functional_call

from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.distributed.random import keyed_generator
from dist_vsd.priors.pipeline_folder import EMBEDDED_FOLDER
from dist_vsd.priors.prior import Text, TextEmbeddings
from dist_vsd.training.state import build_state
from dist_vsd.training.update import update
from tests.runs import gradients_taken

INDEX, SIZE, SAMPLES = 3, 64, 10
SETTINGS = {
    "prompt": "a green duck",
    "num_particles": 1,
    "field": {"num_samples": SAMPLES, "dense_grid": {"resolutions": [6, 10]}},
    "score": {"pose_dropout": 0.0},
    "regularization": {"opacity": 2.0, "entropy": 0.7, "weight_entropy": 40.0, "begin_at": 0.0},
    "timesteps": {"weighting": "sigma_squared", "annealing": "stepped", "anneal_at": 0.5},
}
# fp64 has 16 digits; the longest chain here (render, encoder, twenty UNet layers) loses some five of them.
TOLERANCE = 1e-10


def rand(purpose, *shape, normal=False):
    generator = keyed_generator(0, purpose, update=INDEX)
    return (torch.randn if normal else torch.rand)(*shape, generator=generator).double()


def make_state():
    config = merge(load_preset("embedded"), SETTINGS, "test")
    state = build_state(config, Layout.of(1), torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    for parameter in state.phi.score.phi().values():  # away from the zeros at which LoRA starts
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    for module in (state.prior.unet, state.prior.vae, state.phi.score, state.particles[0].theta):
        module.double()
    embedded = (state.prompt.by_view, state.prompt.plain)
    doubled = [TextEmbeddings(Text(e.cond.tokens.double()), Text(e.uncond.tokens.double())) for e in embedded]
    return dataclasses.replace(state, prompt=dataclasses.replace(state.prompt, by_view=doubled[0], plain=doubled[1]))


def reference_camera(camera):
    """Return c2w (4, 4), fov and the index of the view's words, from the product's random numbers."""
    generator = keyed_generator(0, "camera", update=INDEX)
    u = [float(torch.rand(1, generator=generator)) for _ in range(5)]
    low, high = camera.high_elevation_deg if u[1] < camera.high_elevation_share else camera.elevation_deg
    azimuth_deg, elevation_deg = -180 + 360 * u[0], low + (high - low) * u[2]
    distance, fov_deg = (a + (b - a) * v for (a, b), v in ((camera.distance, u[3]), (camera.fov_deg, u[4])))
    azimuth, elevation = math.radians(azimuth_deg), math.radians(elevation_deg)
    position = [distance * math.cos(elevation) * math.cos(azimuth), distance * math.cos(elevation) * math.sin(azimuth)]
    position = torch.tensor([*position, distance * math.sin(elevation)], dtype=torch.float64)
    backward = position / position.norm()
    right = torch.linalg.cross(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), backward)
    right = right / right.norm()
    c2w = torch.eye(4, dtype=torch.float64)
    c2w[:3] = torch.stack([right, torch.linalg.cross(backward, right), backward, position], 1)
    words = 3 if elevation_deg > 60 else 0 if abs(azimuth_deg) < 45 else 2 if abs(azimuth_deg) > 135 else 1
    return c2w, math.radians(fov_deg), words


def trilinear(grid, points):
    """Interpolate a (1, F, R, R, R) grid, indexed [z, y, x] or its mirror alike by `axes`, at (N, 3) points in [-1, 1]^3."""
    values, size = grid[0], grid.shape[-1]
    position = ((points + 1) / 2 * (size - 1)).clamp(0, size - 1)
    lower = position.floor().clamp(max=size - 2).long()
    f = position - lower
    total = 0.0
    for corner in range(8):
        bits = [(corner >> axis) & 1 for axis in range(3)]
        weight = math.prod(f[:, a] if bits[a] else 1 - f[:, a] for a in range(3))
        i, j, k = (lower[:, a] + bits[a] for a in range(3))
        total = total + weight * values[:, i, j, k]
    return total.T


def reference_render(theta, c2w, fov):
    """Render by the definition of volume rendering, empty space and all; returns (1, 3, H, W) and (H*W,) opacity."""
    pixel = torch.arange(SIZE, dtype=torch.float64)
    y, x = torch.meshgrid(1 - (2 * pixel + 1) / SIZE, (2 * pixel + 1) / SIZE - 1, indexing="ij")
    local = torch.stack([x * math.tan(fov / 2), y * math.tan(fov / 2), -torch.ones_like(x)], -1).reshape(-1, 3)
    directions = (c2w[:3, :3] @ local.T).T
    directions = directions / directions.norm(dim=1, keepdim=True)
    crossings = torch.stack([(side - c2w[:3, 3]) / directions for side in (-1.0, 1.0)])
    near, far = crossings.amin(0).amax(1).clamp_min(0), crossings.amax(0).amin(1)
    length = (far - near).clamp_min(0) / SAMPLES
    offset = rand("ray_jitter", SIZE * SIZE)
    depth = near[:, None] + (torch.arange(SAMPLES) + offset[:, None]) * length[:, None]
    points = (c2w[:3, 3] + depth[..., None] * directions[:, None]).reshape(-1, 3)
    features = torch.cat([trilinear(theta[f"encoding.levels.{i}"], points) for i in range(2)], 1)
    hidden = torch.relu(features @ theta["hidden.weight"].T + theta["hidden.bias"])
    raw = hidden @ theta["output.weight"].T + theta["output.bias"]
    density = torch.log1p(torch.exp(raw[:, 0] + 10 * (1 - points.norm(dim=1) / 0.5))).reshape(-1, SAMPLES)
    inside = (length > 0)[:, None]
    alpha = torch.where(inside, 1 - torch.exp(-density * length[:, None]), 0.0)
    transmittance = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha], 1), 1)
    weights = transmittance[:, :-1] * alpha
    color = (weights[..., None] * (1.1 * torch.sigmoid(raw[:, 1:]) - 0.05).reshape(-1, SAMPLES, 3)).sum(1) + transmittance[:, -1:]
    return color.T.reshape(1, 3, SIZE, SIZE), weights


def reference_eps_phi(unet, phi, x_t, t, y, c2w):
    """eps_phi as the plain UNet with weights W + B A, and the camera's offset in the last bias of the time embedding."""
    weights = dict(unet.named_parameters())
    for name, down in phi.items():
        if "lora_A" in name:
            layer = name.removeprefix("network.unet.").removesuffix(".lora_A.phi.weight")
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + phi[name.replace("lora_A", "lora_B")] @ down
    hidden = torch.nn.functional.silu(phi["camera_embedding.first.weight"] @ c2w.reshape(16) + phi["camera_embedding.first.bias"])
    offset = phi["camera_embedding.last.weight"] @ hidden + phi["camera_embedding.last.bias"]
    weights["time_embedding.linear_2.bias"] = weights["time_embedding.linear_2.bias"] + offset
    return functional_call(unet, weights, (x_t, t, y)).sample


@pytest.fixture(scope="module")
def gradients():
    """Return the product's and the re-derived gradients of theta and phi, by name."""
    state = make_state()
    theta_module = state.particles[0].theta
    theta = {n: p.detach().clone().requires_grad_() for n, p in theta_module.named_parameters()}
    phi = {n: p.detach().clone().requires_grad_() for n, p in state.phi.score.phi().items()}
    taken = {}  # the trainer clears phi's gradients after its step
    state.phi.optimizer.register_step_pre_hook(lambda *_: taken.update({n: p.grad.clone() for n, p in state.phi.score.phi().items()}))
    of_theta = gradients_taken(state.particles[0])
    update(state, INDEX)
    product = of_theta | taken

    unet = UNet2DConditionModel.from_pretrained(EMBEDDED_FOLDER / "unet", torch_dtype=torch.float32).double().requires_grad_(False)
    alphas_cumprod = DDPMScheduler.from_pretrained(EMBEDDED_FOLDER / "scheduler").alphas_cumprod.double()
    c2w, fov, words = reference_camera(state.config.camera)
    image, weights = reference_render(theta, c2w, fov)
    vae = state.prior.vae
    x_0 = vae.encode(2 * image - 1).latent_dist.mean * vae.config.scaling_factor
    y_c, y = state.prompt.by_view, state.prompt.plain.cond.tokens
    with torch.no_grad():
        t = 20 + (rand("timestep", 1).float() * 961).floor().long()
        a = alphas_cumprod[t]
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * rand("noise", 4, 16, 16, normal=True)
        uncond = unet(x_t, t, y_c.uncond.tokens[words : words + 1]).sample
        cond = unet(x_t, t, y_c.cond.tokens[words : words + 1]).sample
        guided = uncond + state.config.guidance_scale * (cond - uncond)
        gradient = (1 - a) * (guided - reference_eps_phi(unet, phi, x_t, t, y, c2w))
    o, w = (p.clamp(1e-5, 1 - 1e-5) for p in (weights.sum(1), weights))
    nats, bits = -(o * o.log() + (1 - o) * (1 - o).log()).mean(), -(w * w.log2() + (1 - w) * (1 - w).log2()).mean()
    surrogate = (gradient * x_0).sum() + 2.0 * weights.sum(1).mean() + 0.7 * nats + 40.0 * bits
    names = list(theta)
    reference = dict(zip(names, torch.autograd.grad(surrogate, [theta[n] for n in names]), strict=True))

    t = (rand("phi_timestep", 1).float() * 1000).floor().long()
    eps, a = rand("phi_noise", 4, 16, 16, normal=True), alphas_cumprod[t]
    x_t = a.sqrt() * x_0.detach() + (1 - a).sqrt() * eps
    loss = (reference_eps_phi(unet, phi, x_t, t, y, c2w) - eps).pow(2).mean()
    reference |= dict(zip(phi, torch.autograd.grad(loss, list(phi.values())), strict=True))
    return product, reference


def relative_error(product, reference, chosen):
    difference = torch.cat([(product[n] - reference[n]).flatten() for n in chosen])
    return float(difference.norm() / torch.cat([reference[n].flatten() for n in chosen]).norm())


def test_theta_gradient_equals_the_rederivation(gradients):
    product, reference = gradients
    chosen = [n for n in reference if n.startswith(("encoding", "hidden", "output"))]
    assert len(chosen) == 6
    assert relative_error(product, reference, chosen) < TOLERANCE


def test_phi_gradient_equals_the_rederivation(gradients):
    product, reference = gradients
    chosen = [n for n in reference if "lora_" in n or n.startswith("camera_embedding")]
    assert len(chosen) > 40
    assert relative_error(product, reference, chosen) < TOLERANCE
