"""particles/image.py: a picture of logits."""

import pytest
import torch

from dist_vsd.cameras import turntable
from dist_vsd.particles.image import ImageParticle
from dist_vsd.particles.particle_configs import ImageConfig


def particle(seed=0, resolution=16):
    return ImageParticle(ImageConfig(resolution=resolution), torch.Generator().manual_seed(seed))


def cameras(count):
    return turntable(count, 0.0, 2.0, 40.0)


def test_the_render_is_the_sigmoid_of_the_logits_for_every_camera():
    theta = particle()
    render = theta.render(cameras(3), 16)
    assert torch.equal(render.image, theta.logits.sigmoid().expand(3, 3, 16, 16))
    assert torch.equal(render.opacity, torch.ones(3, 1, 16, 16))
    assert render.regularizers == {}


def test_the_start_is_grey_with_a_little_noise_that_depends_on_the_generator_alone():
    torch.manual_seed(1)
    first = particle(seed=4, resolution=64)
    torch.manual_seed(2)
    assert torch.equal(particle(seed=4, resolution=64).logits, first.logits)
    assert not torch.equal(particle(seed=5, resolution=64).logits, first.logits)
    image = first.render(cameras(1), 64).image.detach()
    # Logits of standard deviation 0.1 are colours of 0.025; the mean of 12,288 of them is 0.0002, and four of these.
    assert float(image.mean()) == pytest.approx(0.5, abs=0.001)
    assert float(image.std()) == pytest.approx(0.025, rel=0.05)


@pytest.mark.parametrize("size", [7, 16, 40])
def test_a_plain_colour_stays_itself_at_any_size(size):
    theta = particle()
    color = torch.tensor([0.2, 0.5, 0.9])[None, :, None, None]
    theta.logits.data.copy_(color.logit().expand_as(theta.logits))
    image = theta.render(cameras(2), size).image
    assert image.shape == (2, 3, size, size)
    # The weights of a resized pixel sum to one, up to fp32.
    torch.testing.assert_close(image, color.expand_as(image), rtol=0, atol=1e-6)


def test_the_gradient_of_a_pixel_is_s_times_one_minus_s():
    theta = particle()
    theta.render(cameras(1), 16).image.sum().backward()
    s = theta.logits.detach().sigmoid()
    torch.testing.assert_close(theta.logits.grad, s * (1 - s), rtol=1e-6, atol=0)  # fp32


def test_the_parameter_groups_hold_the_pixels_once_with_their_rate():
    theta = ImageParticle(ImageConfig(resolution=4, lr=0.5), torch.Generator().manual_seed(0))
    (group,) = theta.parameter_groups()
    assert [id(p) for p in group["params"]] == [id(p) for p in theta.parameters()]
    assert group["lr"] == 0.5


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(ValueError, match="image.resolution must be at least 1, got 0: raise --image.resolution"):
        ImageConfig(resolution=0)
