"""priors/embedding_cache.py through embed_texts(): a text is embedded once, whoever asks, and never wrongly."""

import hashlib
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_vsd.priors import embedding_cache, prompts, text_encoder
from dist_vsd.priors.embedding_cache import file_digest
from dist_vsd.priors.pipeline_folder import find_pipeline
from dist_vsd.priors.text_encoder import embed_texts
from tests.tiny_pipelines import build_pipeline
from tests.warm_python import Process

TEXTS = ["a green duck", "a red car, side view", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    for architecture in ("sd1", "sdxl"):
        build_pipeline(architecture, folder / f"{architecture}_words").save_pretrained(folder / architecture)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIST_VSD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def loads(monkeypatch):
    """Return the list of the text encoders that were loaded."""
    loaded, load = [], text_encoder.load_network
    monkeypatch.setattr(text_encoder, "load_network", lambda *arguments: loaded.append(arguments[2]) or load(*arguments))
    return loaded


def entries(cache):
    return sorted((cache / "embeddings").rglob("*.safetensors"))


def assert_same(one, other):
    assert torch.equal(one.tokens, other.tokens)
    assert (one.pooled is None) == (other.pooled is None)
    assert one.pooled is None or torch.equal(one.pooled, other.pooled)


@pytest.mark.parametrize(("architecture", "encoders"), [("sd1", ["text_encoder"]), ("sdxl", ["text_encoder", "text_encoder_2"])])
def test_what_was_embedded_once_is_read_to_the_bit_and_loads_no_encoder(folders, cache, loads, architecture, encoders):
    folder = find_pipeline(str(folders / architecture))
    first = embed_texts(folder, TEXTS)
    assert loads == encoders
    assert len(entries(cache)) == len(TEXTS)
    assert_same(embed_texts(find_pipeline(str(folders / architecture)), TEXTS[::-1]), first[[2, 1, 0]])
    assert loads == encoders


def test_only_texts_that_are_new_are_embedded_and_each_as_if_it_were_alone(folders, cache, loads, monkeypatch, tmp_path):
    folder = find_pipeline(str(folders / "sd1"))
    one = embed_texts(folder, TEXTS[:1])
    both = embed_texts(folder, [*TEXTS, *TEXTS])
    assert len(entries(cache)) == len(TEXTS)
    monkeypatch.setenv("DIST_VSD_CACHE", str(tmp_path / "another"))
    whole = embed_texts(folder, TEXTS)
    assert len(loads) == 3
    assert_same(both[:3], whole)
    assert_same(both[3:], whole)
    assert_same(one, whole[:1])


def test_the_key_is_the_content_wherever_it_lies(folders, cache, loads, tmp_path):
    first = embed_texts(find_pipeline(str(folders / "sd1")), TEXTS)
    copy = shutil.copytree(folders / "sd1", tmp_path / "copy")
    assert_same(embed_texts(find_pipeline(str(copy)), TEXTS), first)
    assert len(loads) == 1


@pytest.mark.parametrize("changed", ["weights", "configuration", "tokenizer"])
def test_another_encoder_or_tokenizer_of_the_same_size_and_time_has_embeddings_of_its_own(folders, cache, monkeypatch, tmp_path, changed):
    monkeypatch.setattr(embedding_cache, "RACY_SECONDS", 0.0)  # digests are kept at once
    copy = shutil.copytree(folders / "sd1", tmp_path / "copy")
    first = embed_texts(find_pipeline(str(copy)), TEXTS)
    names = {"weights": "text_encoder/model.safetensors", "configuration": "text_encoder/config.json"}
    file = copy / names.get(changed, "tokenizer/tokenizer.json")
    before = file.stat()
    if changed == "weights":
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("token_embedding.weight"))
        save_file(tensors | {name: tensors[name] * 2}, file, {"format": "pt"})
    elif changed == "configuration":
        file.write_text(file.read_text().replace('"quick_gelu"', '"gelu_fast" '))
    else:
        text = file.read_text()
        duck, cube = (re.search(rf'"{word}</w>": \d+', text)[0] for word in ("duck", "cube"))
        file.write_text(text.replace(duck, cube.replace("cube", "duck")).replace(cube, duck.replace("duck", "cube")))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    prompts._load_tokenizer.cache_clear()
    assert not torch.equal(embed_texts(find_pipeline(str(copy)), TEXTS).tokens[0], first.tokens[0])
    assert len(entries(cache)) == 2 * len(TEXTS)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


def put_another(file):
    """Replace an entry by that of another text, whole in itself."""
    shutil.copy(next(other for other in file.parent.parent.rglob("*.safetensors") if other != file), file)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, put_another])
def test_a_damaged_entry_is_embedded_anew_and_replaced(folders, cache, loads, damage):
    folder = find_pipeline(str(folders / "sdxl"))
    first = embed_texts(folder, TEXTS)
    damaged = entries(cache)[1]
    kept = damaged.read_bytes()
    damage(damaged)
    assert_same(embed_texts(folder, TEXTS), first)
    assert len(loads) == 4
    assert damaged.read_bytes() == kept


@pytest.mark.parametrize("where", ["a_file/below", "/proc/nowhere"])
def test_a_cache_that_can_not_be_written_is_no_error(folders, loads, tmp_path, monkeypatch, where):
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv("DIST_VSD_CACHE", str(tmp_path / where))
    folder = find_pipeline(str(folders / "sd1"))
    assert_same(embed_texts(folder, TEXTS), embed_texts(folder, TEXTS))
    assert len(loads) == 2


def write_digest_of_embeddings(folder, cache, file):
    """Embed texts in a process of its own."""
    os.environ["DIST_VSD_CACHE"] = cache
    Path(file).write_text(hashlib.sha256(embed_texts(find_pipeline(folder), TEXTS).tokens.numpy().tobytes()).hexdigest())


def test_several_processes_that_start_at_once_get_the_same_and_leave_whole_entries_alone(folders, cache, tmp_path):
    files = [tmp_path / f"digest_{number}" for number in range(3)]
    processes = [Process(write_digest_of_embeddings, str(folders / "sd1"), str(cache), str(file)) for file in files]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len({file.read_text() for file in files}) == 1
    assert len(entries(cache)) == len(TEXTS)
    assert [file for file in cache.rglob("*") if file.is_file() and file.suffix not in (".safetensors", "")] == []


def test_a_files_digest_is_kept_unless_it_changed_a_moment_ago(tmp_path, cache, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    one = file_digest(file)
    assert not (cache / "digests").exists()
    monkeypatch.setattr(embedding_cache, "RACY_SECONDS", 0.0)
    assert file_digest(file) == one
    (kept,) = (cache / "digests").iterdir()
    kept.write_text("0" * 64)
    assert file_digest(file) == "0" * 64  # it is read, not computed
    kept.write_text("0" * 63)
    assert file_digest(file) == one
    file.write_bytes(b"two")
    assert file_digest(file) != one


def test_what_was_not_asked_for_the_longest_goes_when_the_cache_is_full(cache, monkeypatch):
    row = {"tokens": torch.zeros(4, 64)}
    keys = [f"00{number:02d}" for number in range(5)]
    for age, key in enumerate(keys[:4]):
        embedding_cache.write_entry(key, row)
        os.utime(cache / "embeddings" / "00" / f"{key}.safetensors", (age, age))
    size = entries(cache)[0].stat().st_size
    assert embedding_cache.read_entry(keys[0]) is not None  # and so it is the last one to have been asked for
    monkeypatch.setattr(embedding_cache, "MOST_BYTES", 3 * size * embedding_cache.NUM_FOLDERS)
    embedding_cache.write_entry(keys[4], row)
    assert [embedding_cache.read_entry(key) is not None for key in keys] == [True, False, False, True, True]
    monkeypatch.setattr(embedding_cache, "MOST_BYTES", 0)
    embedding_cache.write_entry(keys[1], row)
    assert [file.stem for file in entries(cache)] == [keys[1]]  # what was written last stays in any case


def test_the_folder_is_below_home_unless_it_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("DIST_VSD_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert embedding_cache.cache_folder() == tmp_path / ".cache" / "dist_vsd"
    monkeypatch.setenv("DIST_VSD_CACHE", "~/elsewhere")
    assert embedding_cache.cache_folder() == Path(tmp_path) / "elsewhere"
