"""Figures by CLIP from sums over particles: hand-computed; and that looking changes nothing of a run."""

import itertools
import json
import math

import imageio.v3 as iio
import pytest
import torch

from dist_vsd.cli import main
from dist_vsd.evaluation.clip_figures import ClipSums, clip_score, diversity, figures_of, r_precision
from dist_vsd.evaluation.judge import Verdict
from dist_vsd.evaluation.question import Question, Words, ask
from tests.ranks import run_ranks
from tests.runs import TINY, checkpoint

AXES = torch.eye(4)
NUM_PAIRS = 96


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def verdict(embedding, texts, view=None, pair=None, num_faces=(), is_right_view=None):
    """A verdict on (P, V, D) embeddings, of which the first text is the prompt, with recognised things as given."""
    cosines = embedding @ texts.T
    none = torch.zeros(len(embedding), 0, dtype=torch.int64)
    return Verdict(
        embedding, cosines[..., 0], cosines.softmax(-1), cosines.argmax(-1) == 0,
        torch.zeros(embedding.shape[:2], dtype=torch.int64) if view is None else torch.tensor(view),
        none.bool() if is_right_view is None else torch.tensor(is_right_view),
        none if pair is None else torch.tensor(pair), torch.tensor(num_faces, dtype=torch.int64),
    )  # fmt: skip


def sums(*arguments, num_pairs=0, **options):
    return ClipSums.of(verdict(*arguments, **options), num_pairs)


def test_score_and_precision_of_hand_made_vectors():
    views = torch.stack([AXES[[0, 0]], AXES[[0, 1]]])  # two particles, two views
    assert clip_score(sums(views, AXES[:3]), 2) == 0.75
    assert r_precision(sums(views, AXES[:3]), 2) == 0.75
    assert r_precision(sums(views, AXES[[1, 0, 2]]), 2) == 0.25


def test_copies_have_no_diversity_and_orthogonal_particles_have_all():
    assert diversity(unit(1, 6, 8).expand(5, -1, -1).sum(0), 5) == pytest.approx(0.0, abs=1e-6)
    assert diversity(AXES[:, None].sum(0), 4) == pytest.approx(1.0)


def test_diversity_is_the_mean_over_pairs_and_views():
    embeddings = unit(7, 6, 32)
    pairs = [1 - (embeddings[i] * embeddings[j]).sum(-1).mean() for i, j in itertools.combinations(range(7), 2)]
    assert diversity(embeddings.sum(0), 7) == pytest.approx(float(sum(pairs) / len(pairs)), abs=1e-6)


def test_sums_of_shards_add_up_to_the_whole():
    embeddings, texts = unit(5, 6, 16), unit(9, 16, seed=1)
    found = {"view": [[p % 4] * 6 for p in range(5)], "pair": [[7 * p] * 6 for p in range(5)], "num_faces": [0, 1, 2, 1, 3]}
    whole = sums(embeddings, texts, num_pairs=NUM_PAIRS, **found)
    one, other = ({name: rows[part] for name, rows in found.items()} for part in (slice(0, 2), slice(2, 5)))
    parts = [sums(embeddings[:2], texts, num_pairs=NUM_PAIRS, **one), sums(embeddings[2:], texts, num_pairs=NUM_PAIRS, **other)]
    parts.append(ClipSums.zeros(6, 16, 9, NUM_PAIRS))
    for total, *tensors in zip(whole.tensors, *(part.tensors for part in parts), strict=True):
        torch.testing.assert_close(sum(tensors), total)
    assert whole.multi_faced == 2


def test_recognised_shares_and_the_spread_of_what_a_prompt_leaves_open():
    # A duck is object 5, a car object 7; each has eight pairs, a colour each.
    found = sums(unit(4, 1, 8), unit(12, 8), num_pairs=NUM_PAIRS, pair=[[40], [41], [42], [56]], view=[[0], [0], [1], [1]])
    figures = figures_of(found, 4, Question("a duck", ("a duck", "a car"), Words("duck")))
    assert figures["recognition/object"] == 0.75
    assert figures["recognition/color_bits"] == pytest.approx(1.5)  # red twice, orange, yellow
    assert figures["recognition/view_bits"] == pytest.approx(1.0)
    figures = figures_of(found, 4, Question("a red duck", ("a red duck",), Words("duck", "red")))
    assert figures["recognition/color"] == 0.5
    assert not {"recognition/color_bits", "clip/r_precision", "recognition/view"} & figures.keys()


def test_quality_and_variety_of_sure_and_of_unsure_predictions():
    question = Question("a", ("a", "b", "c", "d"))
    sure = figures_of(sums(AXES[:, None] * 1000, AXES), 4, question)  # each picture shows another text, clearly
    assert (sure["clip/quality_bits"], sure["clip/variety_bits"]) == pytest.approx((0.0, 2.0), abs=1e-5)
    unsure = figures_of(sums(torch.zeros(3, 2, 4), AXES), 3, question)
    assert (unsure["clip/quality_bits"], unsure["clip/variety_bits"]) == pytest.approx((2.0, 2.0), abs=1e-5)
    same = figures_of(sums(AXES[[0, 0]][:, None] * 1000, AXES), 2, question)
    assert (same["clip/quality_bits"], same["clip/variety_bits"]) == pytest.approx((0.0, 0.0), abs=1e-5)


def test_a_question_tells_a_prompt_from_captions_of_its_own_form():
    assert len(ask("a green duck", (), True).candidates) == 96
    assert len(ask("a duck", (), True).candidates) == 12
    assert all(text.endswith("back view") for text in ask("a duck, back view", (), True).candidates)
    assert ask("a duck, back view", (), True).view_texts[0] == "a duck, front view"
    assert ask("duck", (), True).candidates == ("duck",)
    assert ask("a duck", (), False).candidates == ("a duck",)
    assert ask("a duck", ["a mug", "a duck", "a mug"], True).candidates == ("a duck", "a mug")


def looks(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["update"]: line for line in lines if "clip/score" in line}


def test_looking_changes_nothing_of_a_run_and_its_figures_do_not_depend_on_the_layout(tmp_path):
    words = ["a green duck", *TINY]
    assert main(["train", *words, "--preview-every", "2", "--run-dir", str(tmp_path / "often")]) == 0
    assert main(["train", *words, "--run-dir", str(tmp_path / "once")]) == 0
    often, once = checkpoint(tmp_path / "often", 8), checkpoint(tmp_path / "once", 8)
    assert [name for name in once if not torch.equal(once[name], often[name])] == []
    found = looks(tmp_path / "often")
    assert sorted(found) == [2, 4, 6, 8]
    assert looks(tmp_path / "once") == {8: found[8]}
    code, output = run_ranks([*words, "--run-dir", str(tmp_path / "two")], num_ranks=2)
    assert code == 0, output
    assert looks(tmp_path / "two")[8] == pytest.approx(found[8], abs=1e-4)


def test_a_prompt_that_is_no_caption_has_no_r_precision_and_one_particle_no_diversity(tmp_path):
    words = ["duck", *TINY, "--num-updates", "1", "--num-particles", "1", "--run-dir", str(tmp_path / "run")]
    assert main(["train", *words]) == 0
    assert looks(tmp_path / "run")[1].keys() == {"update", "clip/score", "particles/multi_face_rate", "recognition/view"}
    (grid,) = (tmp_path / "run" / "renders").iterdir()
    assert iio.imread(grid).shape == (2 * 16, 6 * 2 * 16, 3)


def test_flat_particles_are_judged_once_and_shown_side_by_side(tmp_path):
    words = ["a duck", "--preset", "image", "--num-updates", "1", "--num-particles", "10", "--run-dir", str(tmp_path / "run")]
    assert main(["train", *words]) == 0
    figures = looks(tmp_path / "run")[1]
    assert {"recognition/color_bits", "recognition/view_bits", "particles/diversity"} <= figures.keys()
    assert not {"particles/multi_face_rate", "recognition/view", "recognition/color"} & figures.keys()
    assert 0.0 <= figures["recognition/color_bits"] <= math.log2(8)
    (grid,) = (tmp_path / "run" / "renders").iterdir()
    assert iio.imread(grid).shape == (2 * 2 * 64, 8 * 2 * 64, 3)
