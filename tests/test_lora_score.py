"""score/: eps_phi on a small UNet with random weights: what is shared with the prior, what is not, and what it costs."""

import copy
import re

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dist_vsd.cameras import turntable
from dist_vsd.diffusion.process import VariancePreserving, eps_from_v
from dist_vsd.objectives.vsd import eps_of_particles
from dist_vsd.priors.embedded.networks import TEXT_WIDTH, build_scheduler, build_unet
from dist_vsd.priors.prior import Text
from dist_vsd.priors.replay import ASKED_BEFORE
from dist_vsd.priors.stable_diffusion import DenoisingUnet
from dist_vsd.scaling.counted_memory import CountedMemory
from dist_vsd.scaling.counted_work import CountedWork
from dist_vsd.score.camera_embedding import CameraEmbedding, pose_of
from dist_vsd.score.lora_layer import CastOnce
from dist_vsd.score.lora_score import LoraScore
from dist_vsd.score.score_config import TARGETS, ScoreConfig
from tests.two_views import TwoViewNetwork

VP = VariancePreserving.from_scheduler_config(build_scheduler().config)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def original():
    """Return a UNet with random weights; tests copy it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_unet().eval()


def make(original, process=VP, rank=4, seed=0, **settings):
    return LoraScore(DenoisingUnet(copy.deepcopy(original), process), ScoreConfig(rank=rank, **settings), generator(seed))


def both_ways(original, dtype):
    """Return phi with its activations kept, and computed again, on copies of a UNet."""
    for recompute in (False, True):
        score = LoraScore(DenoisingUnet(copy.deepcopy(original), VP), ScoreConfig(recompute=recompute), generator())
        yield perturb(score if dtype == torch.float32 else in_bf16(score))


def inputs(count=2):
    """Return x_t, t, y and pose."""
    x_t, y = torch.randn(count, 4, 16, 16, generator=generator()), Text(torch.randn(count, 16, TEXT_WIDTH, generator=generator(1)))
    return x_t, torch.linspace(20, 980, count).long(), y, pose_of(turntable(count, 15.0, 3.0, 40.0), "c2w")


def perturb(score):
    """Move phi away from the zeros at which it starts, as training does."""
    for index, parameter in enumerate(score.phi().values()):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator(index)))
    return score


@torch.no_grad()
def predict(network, x_t, t, y, *pose):
    return network(x_t, t, y, *pose) if isinstance(network, LoraScore) else network(x_t, t, y.tokens).sample


def test_before_training_eps_phi_is_eps_pretrain_to_the_bit_from_any_camera(original):
    score, (x_t, t, y, pose) = make(original), inputs()
    for poses in (pose, -7 * pose, torch.zeros_like(pose)):
        assert torch.equal(predict(score, x_t, t, y, poses), predict(original, x_t, t, y))


def merged(original, score):
    """Return a plain UNet whose weights have phi's added: W + (alpha / rank) B A."""
    found = copy.deepcopy(original)
    layers = dict(found.named_modules())
    for name, layer in score.network.unet.named_modules():
        if isinstance(layer, BaseTunerLayer):
            down, up = layer.lora_A["phi"].weight, layer.lora_B["phi"].weight
            layers[name].weight.data += torch.einsum("or,r...->o...", up.flatten(1), down)
    return found


OF_TARGETS = {"feedforward": r"\.ff\.net\.", "convolutions": r"conv|samplers", "time": r"\.time_emb_proj$", "attention": r"\.attn[12]\.to"}


@pytest.mark.parametrize("targets", [*((target,) for target in TARGETS), TARGETS])
def test_lora_beside_any_layers_is_a_network_with_their_products_added_and_begins_as_the_prior(original, targets):
    score, (x_t, t, y, pose) = make(original, targets=targets, camera="none"), inputs()
    assert torch.equal(predict(score, x_t, t, y, pose), predict(original, x_t, t, y))
    layers = [name for name, module in original.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert len(score._adapted) == sum(bool(re.search(OF_TARGETS[target], name)) for target in targets for name in layers) > 0
    perturb(score)
    expected = predict(merged(original, score), x_t, t, y)
    assert float((expected - predict(original, x_t, t, y)).abs().mean()) > 1e-3
    for _ in range(ASKED_BEFORE + 2):  # as a network, and then replayed
        found = predict(score, x_t, t, y, pose)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


def test_a_target_that_a_network_lacks_is_refused_with_those_that_it_has():
    with pytest.raises(ValueError, match=r"^score.targets: this prior's network has no convolutions that LoRA may .*: use attention$"):
        LoraScore(TwoViewNetwork(VP), ScoreConfig(targets=("attention", "convolutions")), generator())


def test_a_trained_phi_leaves_the_pretrained_model_untouched_to_the_bit(original):
    score, (x_t, t, y, pose) = perturb(make(original)), inputs()
    before = predict(score, x_t, t, y, pose)
    assert torch.equal(predict(score.network.unet, x_t, t, y), predict(original, x_t, t, y))
    assert float((before - predict(original, x_t, t, y)).abs().mean()) > 1e-2
    assert torch.equal(predict(score, x_t, t, y, pose), before)


def test_the_prior_is_asked_as_the_pretrained_model_also_after_an_error_inside_eps_phi_and_phi_stays_trainable(original):
    score, (x_t, t, y, pose) = perturb(make(original)), inputs()
    before = predict(score, x_t, t, y, pose)
    with pytest.raises(RuntimeError):
        score(x_t[:, :3], t, y, pose)  # a channel too few, found inside the UNet
    assert torch.equal(predict(score.network.unet, x_t, t, y), predict(original, x_t, t, y))
    assert torch.equal(predict(score, x_t, t, y, pose), before)
    assert all(p.requires_grad for p in score.phi().values())


def test_lora_matrices_alone_change_eps_phi_and_are_switched_off_with_the_rest(original):
    score, (x_t, t, y, pose) = make(original), inputs()
    for name, parameter in score.phi().items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator())
    assert not torch.equal(predict(score, x_t, t, y, pose), predict(original, x_t, t, y))
    assert torch.equal(predict(score, x_t, t, y, pose), predict(score, x_t, t, y, 3 * pose))  # the camera still says nothing


def test_the_camera_matters_once_its_last_layer_is_not_zero(original):
    score, (x_t, t, y, pose) = make(original), inputs()
    score.camera_embedding.last.weight.data.normal_(std=0.1, generator=generator())
    assert not torch.equal(predict(score, x_t, t, y, pose), predict(score, x_t, t, y, pose.flip(0)))
    # The pose of one sample does not reach another.
    one_moved = torch.cat([pose[:1], pose[:1]])
    assert torch.equal(predict(score, x_t, t, y, pose)[0], predict(score, x_t, t, y, one_moved)[0])
    assert not torch.equal(predict(score, x_t, t, y, pose)[1], predict(score, x_t, t, y, one_moved)[1])


def test_gradients_reach_all_of_phi_and_the_renders_but_not_the_unet(original):
    score, (x_t, t, y, pose) = perturb(make(original)), inputs()
    x_t.requires_grad_()
    score(x_t, t, y, pose).square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in score.phi().values())
    assert bool(x_t.grad.abs().sum() > 0)
    own = [p for name, p in score.named_parameters() if name not in score.phi()]
    assert all(not p.requires_grad and p.grad is None for p in own)


def test_phi_moves_and_the_unets_own_weights_do_not_in_an_optimiser_step(original):
    score, sample = make(original), inputs()
    optimizer = torch.optim.AdamW(score.phi().values(), lr=1e-2)
    score(*sample).square().sum().backward()
    optimizer.step()
    assert not torch.equal(predict(score, *sample), predict(original, *sample[:3]))
    assert torch.equal(predict(score.network.unet, *sample[:3]), predict(original, *sample[:3]))


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_phi_has_as_many_numbers_as_counted_by_hand_and_there_is_no_second_unet(original, rank):
    score = make(original, rank=rank)
    # 3 transformers 64 wide and 4 of 96. Rank r on Linear(i, o) has r (i + o) numbers: q, k, v, out of attn1 and q, out of attn2
    # are w -> w, k and v of attn2 96 -> w: r (6 * 2w + 2 (96 + w)) in all. The camera: Linear(16, 128) and Linear(128, 128).
    lora = sum(rank * (12 * w + 2 * (96 + w)) for w in (64, 64, 64, 96, 96, 96, 96))
    camera = (16 * 128 + 128) + (128 * 128 + 128)
    assert sum(p.numel() for p in score.phi().values()) == lora + camera
    in_unet = sum(p.numel() for p in original.parameters())
    assert sum(p.numel() for p in score.parameters()) == in_unet + lora + camera
    assert len({p.data_ptr() for p in score.parameters()}) == len(list(score.parameters()))


def test_phi_starts_from_the_given_generator_alone(original):
    torch.manual_seed(1)
    first = make(original, seed=3)
    torch.manual_seed(2)
    same, other = make(original, seed=3).phi(), make(original, seed=4).phi()
    assert all(torch.equal(p, same[name]) for name, p in first.phi().items())
    assert not any(torch.equal(p, other[name]) for name, p in first.phi().items() if "lora_A" in name)
    assert all(bool((p == 0).all()) for name, p in first.phi().items() if "lora_B" in name)


def test_a_v_prediction_is_turned_into_eps(original):
    process = VariancePreserving(VP.alphas_cumprod, "v_prediction")
    x_t, t, y, pose = inputs()
    v = predict(make(original), x_t, t, y, pose)
    score = make(original, process)
    assert torch.equal(predict(score, x_t, t, y, pose), v)
    with torch.no_grad():
        eps = eps_of_particles(score, x_t, t, y, pose, entropy_weight=0.0)
    assert torch.equal(eps, eps_from_v(v, x_t, *process.alpha_sigma(t, x_t)))


def test_the_camera_embedding_is_zero_at_the_start_and_two_layers_by_hand_later():
    embedding, pose = CameraEmbedding(16, 8, generator()), pose_of(turntable(3, 15.0, 3.0, 40.0), "c2w")
    assert torch.equal(embedding(pose), torch.zeros(3, 8))
    embedding.last.weight.data.normal_(generator=generator())
    hidden = pose @ embedding.first.weight.T
    by_hand = (hidden * hidden.sigmoid()) @ embedding.last.weight.T
    torch.testing.assert_close(embedding(pose), by_hand, rtol=1e-5, atol=1e-6)  # fp32


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"rank": 0}, "score.rank must be at least 1, got 0: raise --score.rank"),
        ({"steps_per_update": 0}, "raise --score.steps-per-update"),
        ({"pose_dropout": 1.1}, r"score.pose_dropout must be in \[0, 1\], got 1.1"),
    ],
)
def test_scores_that_can_not_be_are_refused(changes, rule):
    with pytest.raises(ValueError, match=rule):
        ScoreConfig(**changes)


def in_bf16(score):
    torch.nn.Module.to(score.network.unet, torch.bfloat16)
    for parameter in score.phi().values():
        parameter.data = parameter.data.float()
    return score


def gradients_of(score, sample):
    score.zero_grad(set_to_none=True)
    score(*sample).square().mean().backward()
    return torch.cat([p.grad.flatten() for name, p in score.phi().items() if "lora_" in name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_computed_again_give_the_same_gradient_and_are_not_held_meanwhile(original, dtype):
    """The way back runs phi's blocks after phi's own call, when its adapters are off: it must not meet the pretrained ones."""
    sample, gradients, held = inputs(), [], []
    for score in both_ways(original, dtype):
        with CountedMemory() as memory:
            loss = score(*sample).square().mean()
        held.append(memory.live_bytes)
        del loss
        gradients.append(gradients_of(score, sample))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)
    assert held[1] < 0.6 * held[0]  # of a small network; what stays are the blocks' inputs


@pytest.mark.parametrize("targets", [("attention",), TARGETS])
def test_beside_a_bf16_network_phi_is_no_further_from_fp32_than_with_layers_of_fp32_and_its_gradients_are_fp32(
    original, monkeypatch, targets
):
    sample = inputs()
    exact = gradients_of(perturb(make(original, targets=targets)), sample)
    score = in_bf16(perturb(make(original, targets=targets)))
    found = gradients_of(score, sample)
    assert {p.grad.dtype for p in score.phi().values()} == {torch.float32}
    monkeypatch.setattr(LoraScore, "_cast_matrices", lambda _: None)  # peft's way: each layer computes in fp32
    slow = gradients_of(score, sample)
    error, slow_error = (float((one - exact).norm() / exact.norm()) for one in (found, slow))
    assert error < 1.2 * slow_error < 0.1  # what the network's own rounding leaves


def test_lora_computes_in_the_networks_precision_and_casts_its_matrices_once_a_pass(original, monkeypatch):
    score, sample, casts = in_bf16(perturb(make(original))), inputs(), []
    cast = CastOnce.apply
    monkeypatch.setattr(CastOnce, "apply", lambda dtype, *tensors: casts.append(len(tensors)) or cast(dtype, *tensors))
    seen = set()
    for layer in score._adapted:
        layer.base_layer.register_forward_hook(lambda _layer, inputs, output: seen.update((inputs[0].dtype, output.dtype)))
    with CountedWork() as work:
        predict(score, *sample)
    assert casts == [2 * len(score._adapted)]
    assert seen == {torch.bfloat16}
    peft_work = CountedWork()
    monkeypatch.setattr(LoraScore, "_cast_matrices", lambda _: None)
    with peft_work:
        predict(score, *sample)
    assert sum(work.flop.values()) == sum(peft_work.flop.values())
    assert work.num_operations < peft_work.num_operations - 4 * len(score._adapted)


def test_before_training_eps_phi_is_eps_pretrain_to_the_bit_in_bf16_too(original):
    score, (x_t, t, y, pose) = in_bf16(make(original)), inputs()
    with torch.no_grad():
        assert torch.equal(score(x_t, t, y, pose), score.network(x_t, t, y))
