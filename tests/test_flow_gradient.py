"""The update on rectified flows: its gradients equal autograd through a plain re-derivation, in fp64 on tiny ones of each kind.

As tests/test_update_gradient.py, whose camera and renderer are taken: nothing else is shared with the product but the frozen networks and
the random numbers. LoRA is merged into the weights (W + B A), the camera's offset into the last bias of what becomes the time embedding.
"""

import dataclasses

import diffusers
import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import interpolate, silu

from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.priors.prior import Text, TextEmbeddings
from dist_vsd.training.state import build_state
from dist_vsd.training.update import update
from tests.runs import gradients_taken
from tests.test_update_gradient import INDEX, SETTINGS, TOLERANCE, rand, reference_camera, reference_render, relative_error
from tests.tiny_flows import CHANNELS, FLOWS, IMAGE_SIZE, LATENT_SIZE, write_flow

CLASSES = {"sd3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel", "sana": "SanaTransformer2DModel"}
LAST_BIAS = dict.fromkeys(("sd3", "flux"), "time_text_embed.text_embedder.linear_2.bias")
LAST_BIAS |= {"sana": "time_embed.emb.timestep_embedder.linear_2.bias"}
SHIFTS = {"sd3": 3.0, "flux": 1.5830842480788643, "sana": 3.0}  # FLUX: exp(0.5 + 0.65 (16 - 256) / 3840), of 16 tokens
LATENT = (CHANNELS, LATENT_SIZE, LATENT_SIZE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("flows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIST_VSD_CACHE", str(root / "cache"))
        yield {kind: write_flow(kind, root / kind) for kind in FLOWS}


def doubled(y):
    texts = (y.cond, y.uncond)
    return TextEmbeddings(*(Text(*(None if rows is None else rows.double() for rows in text.fields)) for text in texts))


def make_state(folder, objective):
    settings = SETTINGS | {"prior": str(folder), "objective": objective, "regularization": {"opacity": 0.0}}
    config = merge(load_preset("embedded"), settings, "test")
    state = build_state(config, Layout.of(1), torch.device("cpu"))
    modules = [state.prior.transformer, state.prior.vae, state.particles[0].theta]
    if state.phi is not None:
        modules.append(state.phi.score)
        generator = torch.Generator().manual_seed(5)
        for parameter in state.phi.score.phi().values():  # away from the zeros at which LoRA starts
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    for module in modules:
        module.double()
    prompt = dataclasses.replace(state.prompt, by_view=doubled(state.prompt.by_view), plain=doubled(state.prompt.plain))
    return dataclasses.replace(state, prompt=prompt)


def packed(latents):
    """Return tokens of 2 x 2 latents, one by one: channel by channel, and in each row by row."""
    rows = range(0, LATENT_SIZE, 2)
    return torch.stack([latents[:, :, i : i + 2, j : j + 2].reshape(len(latents), -1) for i in rows for j in rows], 1)


def unpacked(tokens):
    latents, places = tokens.new_empty(len(tokens), *LATENT), [(i, j) for i in range(0, LATENT_SIZE, 2) for j in range(0, LATENT_SIZE, 2)]
    for number, (i, j) in enumerate(places):
        latents[:, :, i : i + 2, j : j + 2] = tokens[:, number].reshape(len(tokens), CHANNELS, 2, 2)
    return latents


def ask(kind, transformer, weights, x_t, s, y, guidance_embedding):
    """Return the velocity, each transformer asked as its paper's pipeline asks it."""
    given = {"encoder_hidden_states": y.tokens, "return_dict": False}
    if kind == "sd3":
        given |= {"hidden_states": x_t, "timestep": 1000 * s, "pooled_projections": y.pooled}
    elif kind == "sana":
        given |= {"hidden_states": x_t, "timestep": 1000 * 0.5 * s, "encoder_attention_mask": y.mask}
    else:
        places = torch.tensor([[0.0, i, j] for i in range(LATENT_SIZE // 2) for j in range(LATENT_SIZE // 2)])
        given |= {"hidden_states": packed(x_t), "timestep": s, "pooled_projections": y.pooled, "img_ids": places}
        given |= {"txt_ids": torch.zeros(y.tokens.shape[1], 3), "guidance": torch.tensor([guidance_embedding])}
    (answer,) = functional_call(transformer, weights, (), given)
    return unpacked(answer) if kind == "flux" else answer


def with_phi(kind, transformer, phi, c2w):
    """Return the transformer's weights with LoRA and the camera in them."""
    weights = dict(transformer.named_parameters())
    for name, down in phi.items():
        if "lora_A" in name:
            layer = name.removeprefix("network.transformer.").removesuffix(".lora_A.phi.weight")
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + phi[name.replace("lora_A", "lora_B")] @ down
    hidden = silu(phi["camera_embedding.first.weight"] @ c2w.reshape(16) + phi["camera_embedding.first.bias"])
    offset = phi["camera_embedding.last.weight"] @ hidden + phi["camera_embedding.last.bias"]
    return weights | {LAST_BIAS[kind]: weights[LAST_BIAS[kind]] + offset}


def encoded(kind, vae, image):
    picture = interpolate(2 * image - 1, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
    if kind == "sana":
        return vae.encode(picture).latent * 0.41
    return (vae.encode(picture).latent_dist.mean - 0.06) * 1.5


def time_of(purpose, low, high, shift):
    """Return s in the precision of the draws: fp32."""
    u = low + (high - low) * rand(purpose, 1).float()
    return shift * u / (1 + (shift - 1) * u)


def both_gradients(kind, folder, objective):
    """Return the product's and the re-derived gradients of theta and, of VSD, phi, by name."""
    state = make_state(folder, objective)
    theta = {n: p.detach().clone().requires_grad_() for n, p in state.particles[0].theta.named_parameters()}
    phi, taken = {}, {}
    if state.phi is not None:
        phi = {n: p.detach().clone().requires_grad_() for n, p in state.phi.score.phi().items()}
        state.phi.optimizer.register_step_pre_hook(lambda *_: taken.update({n: p.grad.clone() for n, p in state.phi.score.phi().items()}))
    of_theta = gradients_taken(state.particles[0])
    update(state, INDEX)
    product = of_theta | taken

    transformer = getattr(diffusers, CLASSES[kind]).from_pretrained(folder / "transformer").double().requires_grad_(False)
    plain = dict(transformer.named_parameters())
    c2w, fov, words = reference_camera(state.config.camera)
    x_0 = encoded(kind, state.prior.vae, reference_render(theta, c2w, fov)[0])
    y_c, y = state.prompt.by_view, state.prompt.plain.cond
    row, guidance_scale = slice(words, words + 1), state.config.guidance_scale
    with torch.no_grad():
        s, eps = time_of("timestep", 0.02, 0.98, SHIFTS[kind]), rand("noise", *LATENT, normal=True)
        share = s.double()
        x_t = (1 - share) * x_0 + share * eps
        v_uncond, v_cond = (ask(kind, transformer, plain, x_t, s, text[row], 3.5) for text in (y_c.uncond, y_c.cond))
        eps_pretrain = x_t + (1 - share) * (v_uncond + guidance_scale * (v_cond - v_uncond))
        eps_other = eps
        if phi:
            eps_other = x_t + (1 - share) * ask(kind, transformer, with_phi(kind, transformer, phi, c2w), x_t, s, y, 1.0)
        gradient = share.square() * (eps_pretrain - eps_other)
    reference = dict(zip(theta, torch.autograd.grad((gradient * x_0).sum(), list(theta.values())), strict=True))
    if phi:
        s, eps = time_of("phi_timestep", 0.0, 1.0, SHIFTS[kind]), rand("phi_noise", *LATENT, normal=True)
        x_0 = x_0.detach()
        x_t = (1 - s.double()) * x_0 + s.double() * eps
        v_phi = ask(kind, transformer, with_phi(kind, transformer, phi, c2w), x_t, s, y, 1.0)
        loss = (v_phi - (eps - x_0)).pow(2).mean()
        found = torch.autograd.grad(loss, list(phi.values()), allow_unused=True)
        reference |= {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(phi.items(), found, strict=True)}
    return product, reference


@pytest.mark.parametrize("kind", FLOWS)
def test_the_gradients_of_vsd_equal_the_rederivation(folders, kind):
    product, reference = both_gradients(kind, folders[kind], "vsd")
    of_phi = [n for n in reference if "lora_" in n or n.startswith("camera_embedding")]
    of_theta = [n for n in reference if n not in of_phi]
    assert (len(of_theta), len(of_phi) > 20) == (6, True)
    assert relative_error(product, reference, of_theta) < TOLERANCE
    assert relative_error(product, reference, of_phi) < TOLERANCE


@pytest.mark.parametrize("kind", FLOWS)
def test_the_gradient_of_sds_equals_the_rederivation(folders, kind):
    product, reference = both_gradients(kind, folders[kind], "sds")
    assert relative_error(product, reference, list(reference)) < TOLERANCE
