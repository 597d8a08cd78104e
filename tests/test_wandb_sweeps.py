"""The words that wandb's agents give to `train`, expanded by wandb's own code from launch_configs/wandb/."""

import itertools
import sys
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from dist_vsd.cli import COMMANDS
from dist_vsd.commands.arguments import flags_of, spell_out
from dist_vsd.commands.train_words import TrainArguments, _early_value, _run_dir, parse_words
from dist_vsd.config import RunConfig
from tests.runs import ROOT

SWEEPS = sorted((ROOT / "launch_configs" / "wandb").glob("sweep_*.yaml"))


def extremes(parameter):
    """Return the values of a sweep's parameter: all of a list, or both ends of a distribution."""
    if "value" in parameter:
        return [parameter["value"]]
    return parameter.get("values") or [parameter["min"], parameter["max"]]


def runs_of(sweep):
    """Yield (values, words) of every corner of a sweep, as an agent expands its command."""
    names = list(sweep["parameters"])
    for values in itertools.product(*(extremes(sweep["parameters"][name]) for name in names)):
        chosen = dict(zip(names, values, strict=True))
        variables = create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})
        variables["env"] = ["/usr/bin/env"]
        words = []
        for word in create_sweep_command(list(sweep["command"])):
            words += variables[word[2:-1]] if word.startswith("${") else [word]
        yield chosen, words


def value_of(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return list(config) if isinstance(config, tuple) else config


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_run_of_a_sweep_gets_the_values_that_the_agent_chose(file):
    sweep = yaml.safe_load(file.read_text())
    count = 0
    for chosen, words in runs_of(sweep):
        at = words.index("train")
        assert words[: at + 1][-3:] == ["-m", "dist_vsd", "train"]
        assert "train" in COMMANDS
        parsed = parse_words(words[at + 1 :])
        values = {name: value_of(parsed if name == "preset" else parsed.run, name) for name in chosen}
        assert values == chosen
        count += 1
    assert count >= 12


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_a_sweep_starts_a_launcher_with_a_configuration_that_exists(file):
    sweep = yaml.safe_load(file.read_text())
    command = sweep["command"]
    assert (Path(sys.executable).parent / command[command.index("launch") - 1]).exists()
    assert (ROOT / command[command.index("--config_file") + 1]).is_file()
    assert sweep["metric"]["name"] in ("clip/score", "clip/r_precision")


def test_runs_of_a_sweep_that_share_a_prompt_have_directories_of_their_own(monkeypatch):
    config = RunConfig(prompt="a green duck")
    assert str(_run_dir(config)) == "runs/a-green-duck"
    monkeypatch.setenv("WANDB_RUN_ID", "x1y2")
    assert str(_run_dir(config)) == "runs/a-green-duck-x1y2"
    monkeypatch.setenv("WANDB_RUN_ID", "../x")
    assert str(_run_dir(config)) == "runs/a-green-duck"


def test_booleans_and_lists_are_spelt_out_and_text_is_left_alone():
    flags = flags_of(TrainArguments)
    given = ["--turntables=False", "--particles.offload=True", "--particles.offload=false", "--camera.distance=[2, 3.5]", "--resume=true"]
    expected = ["--no-turntables", "--particles.offload", "--particles.no-offload", "--camera.distance", "2", "3.5", "--resume"]
    assert spell_out(given, flags) == expected
    same = ["--negative_prompt=True", "--turntables=maybe", "--camera.distance=[2", "--unknown=True", "a prompt=[1]"]
    assert spell_out(same, flags) == [*same[:2], "--camera.distance", "[2", *same[3:]]


def test_a_prompt_of_an_agent_is_any_text():
    for prompt in ("--seed=3", "$(touch x)", "a=b 'c' \"d\"", "-", "True"):
        parsed = parse_words([f"--prompt={prompt}", "--seed=7"]).run
        assert (parsed.prompt, parsed.seed) == (prompt, 7)
    assert _early_value(["--preset=image"], "--preset") == "image"
