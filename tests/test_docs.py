"""README and the guide: every command line runs, every link and picture is there, every flag that is named exists.

What other machines have is replaced by REPLACED, what takes long is made small by SMALL. A line of the guide's chapters on Slurm is run
by a test of its own (test_slurm.py); what installs, or takes hours, is checked as far as its words go.
"""

import configparser
import dataclasses
import importlib
import os
import re
import shutil
import subprocess
import sys
import urllib.parse

import pytest
import trimesh
from accelerate.commands.launch import launch_command_parser

from dist_vsd.cli import COMMANDS
from dist_vsd.commands.arguments import flags_of
from dist_vsd.commands.prior import read_train
from dist_vsd.commands.train_words import parse_words as parse_train
from dist_vsd.priors.clip import EMBEDDED_CLIP_FOLDER
from tests.guide import PAGES, anchors_of, blocks_of, lines_of, tokens_of
from tests.ranks import run_ranks
from tests.runs import ROOT, SMALL, environment
from tests.show_cluster import commands as commands_of_the_cluster
from tests.warm_python import Process

EMBEDDED = ["--num-updates", "2", "--checkpoint-every", "2", "--log-every", "1", "--render-size", "16", "--no-turntables"]
EMBEDDED += ["--field.num-samples", "8", "--field.dense-grid.resolutions", "8", "--wandb.mode", "disabled"]
EMBEDDED += ["--ancestral.num-steps", "4"]
SAMPLES = ["--num-samples", "2", "--num-steps", "2"]
SMALLER = {
    ("train",): EMBEDDED,
    ("render",): ["--size", "24"],
    ("view",): ["--port", "0", "--for-seconds", "0.2"],  # or it goes on until somebody ends it
    ("export",): ["--texture-size", "512"],
    ("evaluate",): ["--num-azimuths", "2", "--num-samples", "2", "--sphere-subdivisions", "0"],
    ("lab",): ["--num-particles", "6", "--num-updates", "2", "--no-pictures"],
    ("bench", "scaling"): ["--ranks", "1", "--repeats", "1", "--num-updates", "2", "--num-warmup", "1", "--strong-particles", "0"],
    ("bench", "update"): ["--num-updates", "1", "--num-warmup", "0"],
    ("prior", "sample"): SAMPLES,
    ("sweep", "plan"): ["--set", "num_updates=2"],
}
FLOWS = ("/stable-diffusion-3", "/Sana_", "/FLUX.")  # parts of names for which a random rectified flow stands in
PRIORS = ("/stable-diffusion-", "path/to/model.safetensors+", "path/to/mvdream")  # parts of names for which a random prior stands in
HOURS = {"train": parse_train, "prior": lambda words: read_train(words[1:])}
FEW = {"256": "4", "64": "3", "32": "2", "16": "4"}
INSTALLED_BY_OTHERS = ("git", "cd", "wandb")


def words_of(line, folder, random_prior, random_flow):
    """Return a line's words as a shell in the folder gives them, with what other machines have replaced."""
    words = []
    for word in line.words:
        is_prior, is_flow = (any(part in word for part in parts) for parts in (PRIORS, FLOWS))
        if "*" in word:
            words += sorted(str(path.relative_to(folder)) for path in folder.glob(word))
            continue
        given = {"path/to/clip": str(EMBEDDED_CLIP_FOLDER), "1200": "3"}.get(word, word)
        words.append(random_flow if is_flow else random_prior if is_prior else given)
    if line.words[1:2] == ["train"]:  # many particles differ from a few by the time that they take
        words = [FEW.get(word, word) for word in words]
    return words


def run(words, folder, tmp_path):
    """Run `dist-vsd` in a forked process; return its exit code and output."""
    output = tmp_path / "output"
    output.unlink(missing_ok=True)
    process = Process(command_process, words, str(folder), environment(), str(output))
    process.join(600)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode, output.read_text()


def command_process(words, folder, variables, output):
    """Be `dist-vsd`."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    from dist_vsd.cli import main

    try:
        code = main(words)
    except SystemExit as end:  # of --help
        code = end.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def in_small(words, random_prior, random_flow=""):
    """Return the words after `dist-vsd`, with those that make it small."""
    if "--resume" in words or "--help" in words:  # a resumed run is what it was
        return words
    extra = SMALLER.get(tuple(words[:1]), SMALLER.get(tuple(words[:2]), []))
    if "--protocol" in words:  # which has its own cameras
        extra = ["--size", "4"]
    if words[0] == "train" and random_prior in words:
        extra = [*SMALL, "--wandb.mode", "disabled"]
    if words[0] == "train" and random_flow in words:
        extra = [*SMALL, "--wandb.mode", "disabled", "--flow.image-size", "16"]
    if "--num-particles" not in words and words[0] == "train" and "--resume" not in words:
        extra = [*extra, "--num-particles", "2"]
    if "stages.yaml" in words:  # which says how many updates there are
        extra = extra[2:]
    if "object" in words:  # stages of two updates each
        of_stages = [word for word in words if re.match(r"\w+\.[\w.]+=", word)]
        words = [word for word in words if word != "--stage" and word not in of_stages]
        counts = [f"{name}.num_updates=2" for name in ("coarse", "geometry", "texture")]
        own = [word for word in of_stages if ".num_updates=" not in word]
        extra = [*extra[2:], "--mesh.resolution", "12", "--stage", *counts, *own]
    cut = words.index("--") if "--" in words else len(words)
    return [*words[:cut], *extra, *words[cut:]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run that most pages look at."""
    folder = tmp_path_factory.mktemp("finished")
    code, output = run(["train", "a green duck", "--num-particles", "2", *EMBEDDED, "--run-dir", "run"], folder, folder)
    assert code == 0, output
    return folder / "run"


def workplace(page, folder, finished):
    """Make the folder that a page's reader stands in."""
    folder.mkdir()
    for name in ("launch_configs", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "prompts.txt").write_text("a red car\n")
    (folder / "prompt_single.txt").write_text("a green duck\n")
    (folder / "prompts.json").write_text('["a green duck"]')
    trimesh.creation.box((1.0, 0.5, 0.25)).export(folder / "house.glb")
    shutil.copytree(finished, folder / "runs" / "a-green-duck")
    for block in blocks_of(page):
        if block.language == "yaml" and block.name:
            (folder / block.name).write_text(re.sub(r"num_updates: \d+", "num_updates: 2", block.text))
    return folder


def check_line(line, folder, random_prior, random_flow, tmp_path):
    """Run a line, or check the words of one that installs, takes hours or wants other machines."""
    words = words_of(line, folder, random_prior, random_flow)
    if words[0] == "dist-vsd" and not words[1].startswith("--") and words[1:3] != ["prior", "train"]:
        if line.words in commands_of_the_cluster(("One run", "Many runs")) and words[2] != "plan":
            return
        if words[1:3] == ["train", "a green duck"] and "--run-dir" not in words and "--dry-run" not in words:
            shutil.rmtree(folder / "runs" / "a-green-duck")
        code, output = run(in_small(words[1:], random_prior, random_flow), folder, tmp_path)
        assert code == 0, output
    elif words[0] == "dist-vsd":
        HOURS.get(words[1], lambda _: None)(words[2:])
    elif words[:2] == ["accelerate", "launch"]:
        launch, train = words[2 : words.index("-m")], words[words.index("train") + 1 :]
        launch += ["-m", "dist_vsd"]
        file = launch.index("--config_file") + 1
        launch[file] = str(ROOT / launch[file])
        run_dir = ["--run-dir", str(folder / f"ranks-{abs(hash(line.text))}")]
        code, output = run_ranks([*in_small(["train", *train], random_prior)[1:], *run_dir], 2, launch)
        assert code == 0, output
    elif words[0] == "sbatch":
        script = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
        assert (ROOT / words[script]).is_file()
        parse_train(words[script + 1 :])
    elif words[0] == "make":
        assert subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True).returncode == 0
    elif words[0] == "pip":
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        for extra in re.findall(r"\[(\w+)\]", line.text):
            assert extra in setup["options.extras_require"]
    elif words[:2] == ["python", "-m"]:
        importlib.import_module(words[2])
    elif words[0] == "python":
        text = (ROOT / words[1]).read_text()
        assert all(f'"{word}"' in text for word in words[2:] if word.startswith("--"))
    else:
        assert words[0] in INSTALLED_BY_OTHERS, line.text


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_every_command_of_a_page_runs(page, tmp_path, finished, random_prior, random_flow):
    lines = lines_of(page)
    if not lines:
        return
    folder = workplace(page, tmp_path / "here", finished)
    for line in lines:
        try:
            check_line(line, folder, random_prior, random_flow, tmp_path)
        except (AssertionError, ValueError) as error:
            pytest.fail(f"{page.name}: {line.text}\n{error}", pytrace=False)


def targets_of(page):
    """Return where a page's links and pictures lead."""
    found = [token.attrs.get("href") or token.attrs.get("src") for token in tokens_of(page) if token.type in ("link_open", "image")]
    return [urllib.parse.unquote(target) for target in found if target and not target.startswith(("http://", "https://"))]


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_every_link_and_picture_leads_somewhere(page):
    for target in targets_of(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors_of(file), f"{page.name}: {target}"


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        linked = {(page.parent / target.partition("#")[0]).resolve() for target in targets_of(page)}
        waiting += [other for other in linked if other.suffix == ".md" and other in PAGES and other not in reached]
    assert set(PAGES) - reached == set()


def known_flags():
    """Return the flags of all commands, and of `accelerate launch`."""
    found = {word for action in launch_command_parser()._actions for word in action.option_strings}
    for name in COMMANDS:
        for module in (name, *(file.stem for file in (ROOT / "dist_vsd/commands").glob(f"{name}_*.py"))):
            for kind in vars(importlib.import_module(f"dist_vsd.commands.{module}")).values():
                if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                    found |= set(flags_of(kind))
    return found | {"--help", "--help-all", "--version"}


OF_OTHER_PROGRAMS = ("--parts", "--only", "--format=", "--nodes", "--dist", "--gpus-per-node", "--requeue", "--signal")


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_every_flag_that_is_named_exists(page):
    known = known_flags()
    for token in tokens_of(page):
        if token.type == "code_inline":
            for word in re.findall(r"(?<![\w-])--[a-z][\w.-]*", token.content):
                name = word.rstrip(".").replace("_", "-")
                plain = name.replace("--no-", "--").replace(".no-", ".")
                is_known = any(flag.replace("_", "-") in (name, plain) for flag in known)
                is_section = any(flag.startswith(f"{name}.") for flag in known)
                assert is_known or is_section or word.startswith(OF_OTHER_PROGRAMS), f"{page.name}: {word} is no flag"


def test_the_readme_is_a_front_door():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_shipped_scripts_are_named_in_the_guide():
    text = "".join(page.read_text() for page in PAGES)
    files = [*(ROOT / "slurm").glob("*.sbatch"), *(ROOT / "launch_configs").glob("*.yaml")]
    assert [file.name for file in files if file.stem not in text] == []


