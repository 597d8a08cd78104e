"""CLIP score, R-precision and diversity: hand-computed; and that looking changes nothing of a run."""

import itertools
import json

import pytest
import torch

from dist_vsd.cli import main
from dist_vsd.evaluation.clip_figures import ClipSums, clip_score, diversity, r_precision
from tests.runs import TINY, checkpoint, train

AXES = torch.eye(4)


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_score_and_precision_of_hand_made_vectors():
    views = torch.stack([AXES[[0, 0]], AXES[[0, 1]]])  # two particles, two views
    sums = ClipSums.of(views, AXES[:3], right=0)
    assert clip_score(sums, 2) == 0.75
    assert r_precision(sums, 2) == 0.75
    assert r_precision(ClipSums.of(views, AXES[:3], right=1), 2) == 0.25


def test_copies_have_no_diversity_and_orthogonal_particles_have_all():
    assert diversity(ClipSums.of(unit(1, 6, 8).expand(5, -1, -1), AXES.new_zeros(1, 8), 0), 5) == pytest.approx(0.0, abs=1e-6)
    assert diversity(ClipSums.of(AXES[:, None], AXES[:1], 0), 4) == pytest.approx(1.0)


def test_diversity_is_the_mean_over_pairs_and_views():
    embeddings = unit(7, 6, 32)
    pairs = [1 - (embeddings[i] * embeddings[j]).sum(-1).mean() for i, j in itertools.combinations(range(7), 2)]
    assert diversity(ClipSums.of(embeddings, unit(1, 32), 0), 7) == pytest.approx(float(sum(pairs) / len(pairs)), abs=1e-6)


def test_sums_of_shards_add_up_to_the_whole():
    embeddings, texts = unit(5, 6, 16), unit(9, 16, seed=1)
    whole = ClipSums.of(embeddings, texts, 3)
    parts = [ClipSums.of(embeddings[:2], texts, 3), ClipSums.of(embeddings[2:], texts, 3), ClipSums.zeros(6, 16, torch.device("cpu"))]
    for name in ("similarity", "hits", "embedding"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))


def looks(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["update"]: line for line in lines if "clip/score" in line}


def test_looking_changes_nothing_of_a_run_and_its_figures_do_not_depend_on_the_layout(tmp_path):
    words = ["a green duck", *TINY]
    assert main(["train", *words, "--media-every", "2", "--run-dir", str(tmp_path / "often")]) == 0
    assert main(["train", *words, "--run-dir", str(tmp_path / "once")]) == 0
    often, once = checkpoint(tmp_path / "often", 8), checkpoint(tmp_path / "once", 8)
    assert [name for name in once if not torch.equal(once[name], often[name])] == []
    found = looks(tmp_path / "often")
    assert sorted(found) == [2, 4, 6, 8]
    assert looks(tmp_path / "once") == {8: found[8]}
    code, output = train([*words, "--run-dir", str(tmp_path / "two")], num_ranks=2)
    assert code == 0, output
    assert looks(tmp_path / "two")[8] == pytest.approx(found[8], abs=1e-4)


def test_a_prompt_that_is_no_caption_has_no_r_precision_and_one_particle_no_diversity(tmp_path):
    words = ["duck", *TINY, "--num-updates", "1", "--num-particles", "1", "--run-dir", str(tmp_path / "run")]
    assert main(["train", *words]) == 0
    assert looks(tmp_path / "run")[1].keys() == {"update", "clip/score"}
