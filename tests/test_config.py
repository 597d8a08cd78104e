"""Configurations: where values come from, what is checked, and that what is written is what is read."""

import dataclasses
import re

import pytest
import yaml

from dist_vsd.cli import main
from dist_vsd.config import CameraConfig, RunConfig, nearest
from dist_vsd.config_files import PRESET_FOLDER, differences, load_preset, merge, preset_names, read_yaml, to_mapping, to_yaml
from dist_vsd.priors.known import GONE, KNOWN_FLOWS, KNOWN_PRIORS, SUGGESTED, SUGGESTED_FLOW
from dist_vsd.score.score_config import ScoreConfig
from tests.runs import ROOT


def merged(text):
    return merge(RunConfig(), yaml.safe_load(text), "test.yaml")


def test_flags_win_over_the_yaml_file_and_that_over_the_preset(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = "num_updates: 50\nseed: 5\nnum_particles: 1\nrepresentation: image\nimage: {resolution: 8}\nscore: {rank: 2}\n"
    (tmp_path / "mine.yaml").write_text(text)
    flags = ["--config", "mine.yaml", "--seed", "6", "--score.pose-dropout", "0.5"]
    assert main(["train", "a green duck", *flags, "--dry-run"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out.partition("\nlayout:")[0])
    preset = load_preset("embedded")
    assert preset.score.lr != ScoreConfig().lr  # so that the preset is seen at all
    expected = dataclasses.replace(
        preset,
        **{"prompt": "a green duck", "run_dir": "runs/a-green-duck", "num_particles": 1, "num_updates": 50, "representation": "image"},
        seed=6,
        num_views=1,  # resolved: one rank, no launcher
        precision="fp32",
        score=dataclasses.replace(preset.score, rank=2, pose_dropout=0.5),
        image=dataclasses.replace(preset.image, resolution=8),
    )
    assert printed == to_mapping(expected)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]  # a dry run writes nothing


def test_numbers_that_yaml_reads_as_text_or_integers_become_floats():
    assert isinstance(yaml.safe_load("1e-3"), str)  # YAML 1.1 wants 1.0e-3
    config = merged("score: {lr: 1e-3}\nguidance_scale: 100\ncamera: {distance: [2, 3e0]}")
    assert (config.score.lr, config.guidance_scale, config.camera.distance) == (0.001, 100.0, (2.0, 3.0))
    assert [type(value) for value in (config.score.lr, config.guidance_scale, *config.camera.distance)] == [float] * 4


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_keeps_all_values_through_yaml(name):
    preset = load_preset(name)
    assert merged(to_yaml(preset)) == preset


def test_presets_for_stable_diffusion_leave_the_prior_to_the_user_and_their_heads_name_one_that_exists():
    for name in (name for name in preset_names() if name.startswith("stable-diffusion")):
        assert load_preset(name).prior == ""
        suggested = SUGGESTED_FLOW if name == "stable-diffusion-3" else SUGGESTED
        assert f"--prior {suggested}" in (PRESET_FOLDER / f"{name}.yaml").read_text()


def test_no_file_of_the_repository_names_a_prior_that_is_gone():
    patterns = ("launch_configs/*.yaml", "slurm/*", "dist_vsd/**/*.py", "dist_vsd/presets/*.yaml")
    files = [file for pattern in patterns for file in ROOT.glob(pattern)]
    shown = {word for file in files if file.name != "known.py" for word in re.findall(r"--prior ([\w./-]+)", file.read_text())}
    assert SUGGESTED in shown
    assert not shown & GONE.keys()
    assert {word for word in shown if "/" in word and "path" not in word} <= {*KNOWN_PRIORS.values(), *KNOWN_FLOWS.values()}


def test_a_configuration_is_read_as_it_was_written():
    config = RunConfig(
        prompt='ein "grüner": Drache,\n# 緑',
        seed=2**40,
        guidance_scale=1e-7,
        resume=True,
        camera=CameraConfig(distance=(0.1, 0.30000000000000004)),
        score=ScoreConfig(lr=3e-5),
    )
    assert config != RunConfig()
    assert merged(to_yaml(config)) == config


def test_an_empty_yaml_file_changes_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# only a remark\n")
    assert merge(RunConfig(), read_yaml(tmp_path / "empty.yaml"), "empty.yaml") == RunConfig()


def test_a_section_given_in_part_keeps_its_other_values():
    start = RunConfig(score=ScoreConfig(rank=16, lr=0.5))
    assert merge(start, {"score": {"lr": 0.25}}, "test").score == ScoreConfig(rank=16, lr=0.25)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("num_partcles: 1", ("'num_partcles'", "did you mean num_particles", "remove or rename")),
        ("timesteps: {anealing: none}", ("'timesteps.anealing'", "did you mean annealing")),
        ("field: {hash_grid: {xyzzy: 1}}", ("'field.hash_grid.xyzzy': remove",)),
        ("7: 8", ("unknown key '7'",)),
        ("seed: 1.5", ("seed must be of type int, got 1.5",)),
        ("seed: true", ("seed must be of type int, got True",)),
        ("seed: null", ("seed must be of type int, got None",)),
        ("guidance_scale: false", ("guidance_scale must be of type float, got False",)),
        ("guidance_scale: strong", ("guidance_scale must be of type float, got 'strong'",)),
        ("resume: 1", ("resume must be of type bool, got 1",)),
        ("prompt: [a duck]", ("prompt must be of type str",)),
        ("camera: {distance: 2.0}", ("camera.distance must be a list of 2, got 2.0",)),
        ("camera: {distance: [1, 2, 3]}", ("camera.distance must be a list of 2, got [1, 2, 3]",)),
        ("camera: {distance: [1, far]}", ("camera.distance must be of type float, got 'far'",)),
        ("score: [1]", ("score must hold keys of its own, got [1]",)),
    ],
)
def test_an_unknown_key_or_a_wrong_type_is_refused_by_its_dotted_name(text, fragments):
    with pytest.raises(ValueError, match=r"^test\.yaml: ") as caught:
        merged(text)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("num_updates: 0", "num_updates must be at least 1, got 0"),
        ("seed: -1", "seed must be 0 or more, got -1"),
        ("objective: vds", "objective must be one of vsd, sds, denoising, clip, ancestral, got 'vds' (did you mean"),
        ("camera: {fov_deg: [70, 40]}", "camera.fov_deg must be a range, low before high, got 70.0 40.0"),
        ("camera: {fov_deg: [0, 40]}", "camera.fov_deg must be above 0 and below 180, got 0.0 40.0"),
        ("camera: {fov_deg: [40, 180]}", "camera.fov_deg must be above 0 and below 180, got 40.0 180.0"),
        ("guidance_scale: -1", "guidance_scale must be 0 or more, got -1.0"),
        ("camera: {distance: [0, 1]}", "camera.distance must be positive, got 0.0"),
        ("camera: {high_elevation_share: 1.5}", "camera.high_elevation_share must be in [0, 1], got 1.5"),
        ("score: {rank: 0}", "score.rank must be at least 1, got 0"),
        ("score: {pose_dropout: -0.1}", "score.pose_dropout must be in [0, 1], got -0.1"),
        ("timesteps: {min_fraction: 0.9}", "min_fraction < late_max_fraction <= max_fraction <= 1, got 0.9"),
        ("timesteps: {anneal_at: 2}", "timesteps.anneal_at must be in [0, 1], got 2.0"),
        ("timesteps: {weighting: sigma}", "timesteps.weighting must be one of"),
        ("field: {encoding: sparse}", "field.encoding must be one of dense, hash, got 'sparse'"),
        ("field: {bound: 0}", "field.bound and density_radius must be positive, got 0.0"),
        ("image: {resolution: 0}", "image.resolution must be at least 1, got 0"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_rule_and_its_source(text, fragment):
    with pytest.raises(ValueError, match=r"^test\.yaml: ") as caught:
        merged(text)
    assert fragment in str(caught.value)


@pytest.mark.parametrize(
    "text", ["score: {lr: -1}", "score: {lr: .nan}", "guidance_scale: .nan", "image: {lr: .inf}", "field: {bound: .nan}"]
)
def test_a_number_that_no_run_can_use_is_refused(text):
    with pytest.raises(ValueError, match=r"^test\.yaml: "):
        merged(text)


def test_nearest_names_the_closest_choices_and_stays_silent_without_any():
    assert nearest("objectiv", ["objective", "seed"]) == " (did you mean objective?)"
    assert nearest("xyzzy", ["objective", "seed"]) == ""


def test_differences_names_each_changed_value_by_its_dotted_path():
    one = to_mapping(RunConfig())
    other = to_mapping(RunConfig(seed=3, score=ScoreConfig(rank=9)))
    assert differences(one, other) == [("seed", 0, 3), ("score.rank", ScoreConfig().rank, 9)]
    assert differences(one, to_mapping(RunConfig())) == []
    assert differences({"a": 1}, {"b": 2}) == [("a", 1, None), ("b", None, 2)]
