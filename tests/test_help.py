"""--help: one screen of everyday flags; --help-all: every flag once, by topic, with its docstring and its default."""

import os
import re
import subprocess
import sys

import pytest

from dist_vsd.cli import COMMANDS, main
from dist_vsd.commands import evaluate, lab, plan, train_words
from dist_vsd.commands.arguments import flags_of
from dist_vsd.commands.help import OTHERS, SCREEN_LINES, by_topic, docstrings_of
from dist_vsd.config_files import load_preset
from tests.runs import environment

SCREENS = {
    "train": (train_words.TrainArguments, train_words.TrainArguments(run=load_preset("embedded")), train_words.PAGES),
    "evaluate": (evaluate.EvaluateArguments, None, evaluate.PAGES),
    "lab": (lab.LabArguments, None, lab.PAGES),
    "plan": (plan.PlanArguments, None, plan.PAGES),
}
SWEEPS = ("plan", "submit", "status", "retry", "cancel", "collect", "dashboard", "run")
SUBCOMMANDS = ["bench scaling", "bench update", "prior sample", "prior train", *(f"sweep {name}" for name in SWEEPS)]


@pytest.fixture(autouse=True)
def _screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def printed(capsys, *words):
    """Return what a command prints of its help; it ends well."""
    try:
        code = main(list(words))
    except SystemExit as end:
        code = end.code
    assert code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [*COMMANDS, *SUBCOMMANDS])
def test_the_help_of_every_command_fits_on_a_screen(command, capsys):
    text = printed(capsys, *command.split(), "--help")
    assert 1 < len(text.splitlines()) <= SCREEN_LINES


@pytest.mark.parametrize("command", SCREENS)
def test_help_names_everyday_flags_and_says_where_the_rest_is(command, capsys):
    pages = SCREENS[command][2]
    text = printed(capsys, command, "--help")
    assert [line.split()[0] for line in text.splitlines() if line.startswith("  --")] == list(pages.everyday)
    assert re.search(r"--help-all explains these and \d+ more flags, by topic", text)
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("command", SCREENS)
def test_every_flag_stands_under_one_topic(command, capsys):
    kind, default, pages = SCREENS[command]
    topics = by_topic(kind, default, pages)
    assert OTHERS not in topics
    assert all(topics.values())
    names = [flag.name for flags in topics.values() for flag in flags]
    assert len(set(names)) == len(names)
    words = {"--prompt", "--run-dirs"}  # they stand without a flag
    assert {re.sub(r"(^--|\.)no-", r"\1", name) for name in names} == flags_of(kind).keys() - words
    text = printed(capsys, command, "--help-all")
    assert [line.strip().split()[0] for line in text.splitlines() if re.match(r"  --\w", line)] == names
    assert [title for title in topics if f"\n{title}:\n" in text] == list(topics)


def test_help_shows_the_defaults_of_the_preset_that_is_given(capsys):
    assert re.search(r"--render-size N +Height and width of a render, pixels \(64\)", printed(capsys, "train", "--help"))
    text = printed(capsys, "train", "--preset", "latent", "--num-particles", "3", "--help")
    assert re.search(r"--num-particles N +Particles, over all ranks together \(16\)", text)


def test_texts_are_the_docstrings_on_one_line():
    texts = docstrings_of(train_words.TrainArguments)
    assert texts["preset"] == "Where the defaults come from; `dist-vsd info` lists the presets."
    assert all(flag.text for name, (kind, default, pages) in SCREENS.items() for flags in by_topic(kind, default, pages).values()
               for flag in flags if not flag.name.endswith(("-lr", ".lr", "weight-decay")))  # fmt: skip


def test_flags_that_are_on_are_shown_by_what_switches_them_off(capsys):
    text = printed(capsys, "train", "--help-all")
    assert re.search(r"--no-turntables +Switches off: Write a turntable", text)
    assert re.search(r"--prompting.no-view-words", text)
    assert main(["train", "a green duck", "--prompting.no-view-words", "--no-turntables", "--num-updates", "0"]) == 2  # they parse
    assert "num_updates must be at least 1" in capsys.readouterr().err


def test_a_command_without_pages_takes_help_all_for_help(capsys):
    assert printed(capsys, "export", "--help-all") == printed(capsys, "export", "--help")


def test_a_mistyped_flag_still_names_its_neighbours_and_points_to_all_flags(capfd):
    assert main(["train", "a green duck", "--score.rnk", "2"]) == 2
    assert re.search(r"did you mean --score\.rank.*see dist-vsd train --help-all", capfd.readouterr().err)


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_a_reader_that_has_had_enough_ends_the_output_without_a_traceback(flag):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dist_vsd", "train", flag]
    done = subprocess.run(command, env=environment(), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
