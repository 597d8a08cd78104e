"""The instruments on the known scenes, rendered: what they show is known exactly."""

import pytest
import torch

from dist_vsd.cameras import turntable
from dist_vsd.config import CameraConfig
from dist_vsd.evaluation.evaluation import figures_of_pictures
from dist_vsd.evaluation.instruments import Instruments
from dist_vsd.evaluation.multi_face import arcs, count_faces, num_faces
from dist_vsd.evaluation.overlap import SCALES, Lattice, scene_distance
from dist_vsd.priors.clip import ClipScorer
from dist_vsd.priors.embedded.captions import caption
from dist_vsd.priors.embedded.render import render_object
from dist_vsd.priors.embedded.scenes import COLORS, NUM_PROPORTIONS, OBJECTS, WITH_A_FRONT
from dist_vsd.training.prompt import words_of
from dist_vsd.view_words import VIEW_WORDS

NUM_AZIMUTHS = 24
CAMERAS = turntable(NUM_AZIMUTHS, 15.0, 2.9, 41.0)
WORDS = words_of(CAMERAS, CameraConfig())


@pytest.fixture(scope="module")
def instruments():
    return Instruments(scorer=ClipScorer.load(), in_embedded_language=True)


@pytest.fixture(scope="module")
def turns():
    """Renders of each object with a front, in a colour of its own."""
    colors = dict(zip(WITH_A_FRONT, ("blue", "green", "white", "yellow", "red", "purple"), strict=True))
    none = torch.zeros(NUM_AZIMUTHS, NUM_PROPORTIONS)
    return {name: (color, render_object(name, [color] * NUM_AZIMUTHS, none, CAMERAS, 64)) for name, color in colors.items()}


def judge(pictures, prompt, instruments):
    return figures_of_pictures(pictures, prompt, instruments, WORDS, NUM_AZIMUTHS)


def two_faced(turn):
    """Show the front half's pictures from behind too: azimuth a looks like 180 - a."""
    half = NUM_AZIMUTHS // 2
    behind = CAMERAS.azimuth_deg.abs() > 90
    return torch.where(behind[:, None, None, None], turn[[(half - i) % NUM_AZIMUTHS for i in range(NUM_AZIMUTHS)]], turn)


@pytest.mark.parametrize(
    ("is_front", "expected"),
    [
        ("000000000000", 0), ("111000000011", 1), ("001110000000", 1), ("111000111000", 2), ("110011001100", 3), ("101010101010", 6),
        ("111111000000", 1), ("111111100000", 2), ("111111111111", 2),
    ],
)  # fmt: skip
def test_arcs_of_the_front_are_counted_around_the_circle_and_one_wider_than_half_a_turn_twice(is_front, expected):
    flags = torch.tensor([flag == "1" for flag in is_front])
    assert sum(arcs(flags)) == int(flags.sum())
    assert {count_faces(flags.roll(shift)) for shift in range(12)} == {expected}


def test_elevations_are_averaged_before_faces_are_counted():
    front, side = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.9, 0.0])
    sure = torch.stack([front] * 3 + [side] * 9)
    odd = torch.stack([front] * 3 + [side] * 4 + [0.95 * front + side] + [side] * 4)
    assert num_faces(odd[None], 12, 0).tolist() == [2]
    assert num_faces(torch.cat([odd, sure])[None], 12, 0).tolist() == [1]
    assert num_faces(odd[None], 12, 1).tolist() == [1]


def test_rendered_scenes_are_recognised_for_what_they_are(instruments, turns):
    for name, (color, turn) in turns.items():
        figures = judge(turn[None], caption(name, color), instruments).figures
        assert figures["recognition/object"] > 0.9, name
        assert figures["recognition/color"] > 0.9, name
        assert figures["clip/r_precision"] > 0.85, name
        assert figures["recognition/view"] > 0.6, name


def test_objects_with_a_front_have_one_face_and_two_faced_pictures_of_them_two(instruments, turns):
    found = {}
    for name, (color, turn) in turns.items():
        evaluation = judge(torch.stack([turn, two_faced(turn)]), caption(name, color), instruments)
        found[name] = evaluation.verdict.num_faces.tolist()
        assert evaluation.figures["particles/multi_face_rate"] == sum(n > 1 for n in found[name]) / 2
    assert found == {name: [1, 2] for name in WITH_A_FRONT}


def test_objects_without_a_front_have_no_multi_face_rate(instruments, turns):
    figures = judge(turns["duck"][1][None], "a green ball", instruments).figures
    assert not {"particles/multi_face_rate", "recognition/view"} & figures.keys()
    assert figures["recognition/object"] == 0.0


def test_pictures_of_all_colors_have_their_entropy_and_copies_none(instruments):
    front = CAMERAS[:1]
    none = torch.zeros(8, NUM_PROPORTIONS)
    pictures = render_object("duck", list(COLORS), none, type(front).cat([front] * 8), 64)[:, None]
    evaluation = figures_of_pictures(pictures, "a duck", instruments)
    assert evaluation.figures["recognition/color_bits"] == pytest.approx(3.0)
    assert evaluation.figures["recognition/view_bits"] == pytest.approx(0.0)
    assert [row[0] for row in evaluation.predictions()["color"]] == list(COLORS)
    assert {row[0] for row in evaluation.predictions()["view"]} == {VIEW_WORDS[0]}
    copies = figures_of_pictures(pictures[:1].expand(8, -1, -1, -1, -1), "a duck", instruments).figures
    assert copies["recognition/color_bits"] == 0.0
    assert copies["particles/diversity"] == pytest.approx(0.0, abs=1e-5)
    assert copies["clip/variety_bits"] == pytest.approx(copies["clip/quality_bits"], abs=1e-5)


def test_precision_over_a_set_of_prompts_falls_when_its_pictures_are_permuted(instruments, turns):
    prompts = tuple(caption(name, color) for name, (color, _) in turns.items())
    from_set = Instruments(scorer=instruments.scorer, in_embedded_language=True, prompts=prompts)
    fronts = [turn[None, :1] for _, turn in turns.values()]
    right = [judge_flat(picture, prompt, from_set) for picture, prompt in zip(fronts, prompts, strict=True)]
    wrong = [judge_flat(picture, prompt, from_set) for picture, prompt in zip(fronts[1:] + fronts[:1], prompts, strict=True)]
    assert (right, wrong) == ([1.0] * 6, [0.0] * 6)


def judge_flat(picture, prompt, instruments):
    return figures_of_pictures(picture, prompt, instruments).figures["clip/r_precision"]


def test_only_the_metrics_that_are_wanted_are_told(turns, instruments):
    few = Instruments(metrics=("clip", "entropy"), scorer=instruments.scorer, in_embedded_language=True)
    assert list(judge(turns["duck"][1][None], "a green duck", few).figures) == ["clip/score", "clip/quality_bits", "clip/variety_bits"]
    assert figures_of_pictures(turns["duck"][1][None], "a green duck", Instruments()).figures == {}


@pytest.fixture(scope="module")
def lattice():
    return Lattice(1.0)


@pytest.mark.parametrize("name", OBJECTS)
def test_blocks_that_are_left_out_hold_no_point_of_a_scene(lattice, name):
    for turn_deg, scale in ((0.0, SCALES[0]), (130.0, 1.0), (250.0, SCALES[-1])):
        assert torch.equal(lattice.inside(name, turn_deg, scale), scene_distance(name, turn_deg, scale, lattice.points) < 0)
