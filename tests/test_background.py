"""particles/background.py: half of the renders over a random colour, the object unchanged, no other draw moved."""

import dataclasses

import pytest
import torch

from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.distributed.random import keyed_generator
from dist_vsd.particles.background import draw_background, over_random_background
from dist_vsd.particles.particle import Render
from dist_vsd.training.draws import Draws
from dist_vsd.training.encoded_renders import render
from dist_vsd.training.stages import Stage
from dist_vsd.training.state import build_state
from dist_vsd.training.work import Work

SETTINGS = {
    "prompt": "a green duck", "num_particles": 1, "render_size": 16,
    "field": {"background": "learned", "num_samples": 8, "dense_grid": {"resolutions": [6]}},
}  # fmt: skip


def render_of(state, index):
    """Return the cameras and the renders of an update."""
    work = Work(state, index)
    (batch,), draws = work.micro_batches(), Draws(state, work, index)
    return draws.cameras(batch.shots), render(state.config, batch, draws)


def a_render():
    opacity = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    foreground = (opacity * 0.25).expand(1, 3, 4, 4)
    return Render(foreground + 1 - opacity, opacity, foreground, {})


def test_about_half_of_the_keyed_renders_lie_over_a_random_colour():
    render, generators = a_render(), [keyed_generator(0, "background", update=update) for update in range(400)]
    shown = [over_random_background(render, draw_background(0.5, generator)) for generator in generators]
    replaced = [one for one in shown if not torch.equal(one.image, render.image)]
    assert 160 <= len(replaced) <= 240  # 400 coins: four standard deviations of 10
    colors = torch.stack([((one.image - one.foreground) / (1 - one.opacity))[0, :, 0, 0] for one in replaced])
    assert len({tuple(color) for color in colors.tolist()}) == len(replaced)
    assert -1e-5 < float(colors.min()) < float(colors.max()) < 1 + 1e-5  # a division's rounding
    torch.testing.assert_close(colors.mean(0), torch.full((3,), 0.5), rtol=0, atol=0.1)  # 160 uniform ones: four of 0.023


def test_the_colour_is_one_and_shows_where_the_object_does_not_cover_it():
    render = a_render()
    image = over_random_background(render, draw_background(1.0, keyed_generator(0, "background"))).image
    generator = keyed_generator(0, "background")
    torch.rand(1, generator=generator)
    color = torch.rand(3, generator=generator).view(1, 3, 1, 1)
    torch.testing.assert_close(image, render.foreground * 1 + color - render.opacity * color)


@pytest.fixture(scope="module")
def renders():
    """The same shot rendered with a share of 0, 0.5 and 1, at ten updates."""
    state = build_state(merge(load_preset("embedded"), SETTINGS, "test"), Layout.of(1), torch.device("cpu"))
    found = {}
    for share in (0.0, 0.5, 1.0):
        field = dataclasses.replace(state.config.field, random_background_share=share)
        state_with = dataclasses.replace(state, stage=Stage.whole(dataclasses.replace(state.config, field=field)))
        found[share] = [render_of(state_with, index) for index in range(10)]
    return found


def test_foreground_opacity_and_cameras_are_the_same_bits_whatever_the_share(renders):
    for share in (0.5, 1.0):
        for (cameras, (plain,)), (same_cameras, (shown,)) in zip(renders[0.0], renders[share], strict=True):
            assert torch.equal(shown.foreground, plain.foreground)
            assert torch.equal(shown.opacity, plain.opacity)
            assert torch.equal(same_cameras.c2w, cameras.c2w)


def test_a_share_replaces_the_background_in_some_updates_and_leaves_it_in_the_others(renders):
    images = {share: [render.image for _, (render,) in renders[share]] for share in renders}
    replaced = {share: sum(not torch.equal(*pair) for pair in zip(images[share], images[0.0], strict=True)) for share in images}
    assert replaced[1.0] == 10
    assert 1 <= replaced[0.5] <= 9


def test_a_replaced_background_gets_no_gradient_and_the_object_does():
    state = build_state(merge(load_preset("embedded"), SETTINGS | {"field": SETTINGS["field"] | {"random_background_share": 1.0}}, "test"),
                        Layout.of(1), torch.device("cpu"))  # fmt: skip
    theta = state.particles[0].theta
    render_of(state, 0)[1][0].image.sum().backward()
    assert not theta.background_output.weight.grad.any()
    assert theta.output.weight.grad.abs().sum() > 0


def test_the_preset_for_objects_has_the_published_background_and_regulariser():
    """Scenes have no random background in their only public configuration (threestudio)."""
    objects, scenes = load_preset("stable-diffusion"), load_preset("stable-diffusion-scene")
    assert (objects.field.background, objects.field.random_background_share) == ("learned", 0.5)
    assert (objects.regularization.weight_entropy, objects.regularization.entropy) == (10.0, 0.0)
    assert (scenes.regularization.weight_entropy, scenes.regularization.entropy) == (10.0, 0.0)
    assert scenes.field.random_background_share == 0.0
