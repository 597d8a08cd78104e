"""LPIPS and DINO by weights that are given: small or random ones, whose distances are computed by other means."""

import itertools

import pytest
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from dist_vsd.evaluation.clip_figures import diversity
from dist_vsd.evaluation.dino import DinoEncoder
from dist_vsd.evaluation.lpips import CONVOLUTIONS, Lpips
from dist_vsd.priors.clip_folder import EMBEDDED_CLIP_FOLDER


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def lpips_tensors():
    tensors = {}
    for layer, (name, (inputs, outputs, kernel, _, _)) in enumerate(CONVOLUTIONS.items()):
        fan = inputs * kernel**2
        tensors[f"{name}.weight"] = (random(outputs, inputs, kernel, kernel, seed=layer) - 0.5) * (12 / fan) ** 0.5
        tensors[f"{name}.bias"] = random(outputs, seed=layer) * 0.1
        tensors[f"lin{layer}.model.1.weight"] = random(1, outputs, 1, 1, seed=layer)
    return tensors


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "size": 28}')
    return folder


def test_lpips_over_all_pairs_is_the_mean_of_the_pairs(lpips_tensors):
    lpips, pictures = Lpips(lpips_tensors), random(3, 2, 3, 40, 40)
    weights = [lpips_tensors[f"lin{layer}.model.1.weight"] for layer in range(5)]
    pairs = []
    for (one, other), view in itertools.product(itertools.combinations(range(3), 2), range(2)):
        features = [lpips.features(pictures[i, view][None]) for i in (one, other)]
        pairs.append(sum(float((w * (a - b).square()).sum(1).mean()) for w, a, b in zip(weights, *features, strict=True)))
    assert lpips.mean_distance(pictures) == pytest.approx(sum(pairs) / len(pairs), rel=1e-4)
    assert min(pairs) > 0.01


def test_lpips_of_copies_is_nothing_and_its_features_have_unit_length(lpips_tensors):
    lpips, picture = Lpips(lpips_tensors), random(1, 1, 3, 64, 64)
    assert lpips.mean_distance(picture.expand(4, -1, -1, -1, -1)) == pytest.approx(0.0, abs=1e-5)
    for features in lpips.features(picture[0]):
        norms = features.norm(dim=1)
        torch.testing.assert_close(norms[norms > 0.5], torch.ones_like(norms[norms > 0.5]), atol=1e-3, rtol=0)


def test_lpips_weights_that_are_missing_damaged_or_of_another_network_are_refused(lpips_tensors, tmp_path):
    def refusal(tensors):
        save_file(tensors, tmp_path / "weights.safetensors")
        with pytest.raises(ValueError, match="can't be used") as refused:
            Lpips.load(tmp_path / "weights.safetensors")
        return str(refused.value)

    assert "net.slice5.10.bias is missing" in refusal({k: v for k, v in lpips_tensors.items() if k != "net.slice5.10.bias"})
    assert "shape (1, 2), not (64,)" in refusal(lpips_tensors | {"net.slice1.0.bias": torch.zeros(1, 2)})
    (tmp_path / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="can't be used"):
        Lpips.load(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="at least 35 pixels, got 32"):
        Lpips(lpips_tensors).mean_distance(random(2, 1, 3, 32, 32))


def test_dino_gives_unit_vectors_by_which_copies_are_alike_and_others_not(dino_folder):
    dino, pictures = DinoEncoder.load(dino_folder), random(3, 2, 3, 40, 40)
    embedding = dino.embed(pictures)
    assert embedding.shape == (3, 2, 16)
    torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(3, 2))
    assert diversity(dino.embed(pictures[:1].expand(3, -1, -1, -1, -1)).sum(0), 3) == pytest.approx(0.0, abs=1e-5)
    assert diversity(embedding.sum(0), 3) > 1e-4


def test_a_dino_folder_of_another_kind_or_without_its_moments_is_refused(dino_folder, tmp_path):
    with pytest.raises(ValueError, match="it is a clip, not one of vit, dinov2"):
        DinoEncoder.load(EMBEDDED_CLIP_FOLDER)
    with pytest.raises(ValueError, match="DINO folder .* can't be loaded"):
        DinoEncoder.load(tmp_path)
    for file in dino_folder.iterdir():
        if file.name != "preprocessor_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="FileNotFoundError"):
        DinoEncoder.load(tmp_path)
