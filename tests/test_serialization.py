"""Tensors on disk: whole or not at all, and back to the bit."""

import functools
import re

import pytest
import torch

from dist_vsd.optimizer import load_optimizer_tensors, optimizer_tensors
from dist_vsd.serialization import read_tensors, write_tensors
from tests.limits import largest_file


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert tensor.shape == other[name].shape
        assert torch.equal(tensor.contiguous().flatten().view(torch.uint8), other[name].flatten().view(torch.uint8)), name


def test_tensors_of_every_kind_come_back_to_the_bit(tmp_path):
    tensors = {
        "float32": torch.tensor([0.1, -0.0, float("nan"), float("inf"), 1e-45]),
        "float64": torch.tensor(1 / 3, dtype=torch.float64).reshape(1),
        "bfloat16": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "bool": torch.tensor([True, False]),
        "int64": torch.tensor([-(2**62), 7]),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.zeros(0, 4),
    }
    write_tensors(tensors, tmp_path / "all.safetensors")
    assert_same_bits({name: tensor.detach() for name, tensor in tensors.items()}, read_tensors(tmp_path / "all.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["all.safetensors"]


def test_a_failed_write_leaves_the_old_content_whole_and_nothing_beside_it(tmp_path):
    file = tmp_path / "theta.safetensors"
    write_tensors({"old": torch.arange(10.0)}, file)
    with largest_file(4096), pytest.raises(OSError, match=re.escape(str(file.name))):
        write_tensors({"new": torch.zeros(100_000)}, file)
    assert_same_bits(read_tensors(file), {"old": torch.arange(10.0)})
    assert [path.name for path in tmp_path.iterdir()] == ["theta.safetensors"]


def test_a_write_into_no_folder_fails_as_a_file_error(tmp_path):
    with pytest.raises(OSError, match="theta"):
        write_tensors({"theta": torch.zeros(1)}, tmp_path / "absent" / "theta.safetensors")


def test_a_leftover_of_a_killed_process_is_replaced(tmp_path):
    (tmp_path / "theta.safetensors.tmp").write_bytes(b"half")
    write_tensors({"theta": torch.ones(1)}, tmp_path / "theta.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["theta.safetensors"]


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage", "a folder"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, damage):
    file = tmp_path / "theta.safetensors"
    write_tensors({"theta": torch.ones(100)}, file)
    whole = file.read_bytes()
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    elif damage != "missing":
        file.write_bytes({"empty": b"", "truncated": whole[:-4], "garbage": b"\xff" * 500}[damage])
    with pytest.raises(ValueError, match=r"theta\.safetensors can't be read as safetensors .* restore or remove it"):
        read_tensors(file)


def parameters_and_optimizer(kind):
    start = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (3, 2), "a": (4,), "unused": (2,)}
    parameters = {name: torch.nn.Parameter(torch.randn(shape, generator=start)) for name, shape in shapes.items()}
    groups = [{"params": [parameters["a.weight"]], "lr": 0.1}, {"params": [parameters["a"], parameters["unused"]], "lr": 0.02}]
    return parameters, kind(groups)


def step(parameters, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for name in ("a.weight", "a"):
        parameters[name].grad = torch.randn(parameters[name].shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, torch.optim.AdamW, functools.partial(torch.optim.Adam, fused=True)], ids=["Adam", "AdamW", "fused Adam"]
)
def test_an_optimizer_that_was_saved_and_loaded_goes_on_to_the_bit(tmp_path, kind):
    parameters, optimizer = parameters_and_optimizer(kind)
    for seed in (1, 2):
        step(parameters, optimizer, seed)
    names = {parameter: name for name, parameter in parameters.items()}
    write_tensors(optimizer_tensors(optimizer, names) | {f"theta/{n}": p for n, p in parameters.items()}, tmp_path / "all.safetensors")

    loaded, fresh = parameters_and_optimizer(kind)
    saved = read_tensors(tmp_path / "all.safetensors")
    with torch.no_grad():
        for name, parameter in loaded.items():
            parameter.copy_(saved.pop(f"theta/{name}"))
    names = {parameter: name for name, parameter in loaded.items()}
    load_optimizer_tensors(fresh, names, saved)
    assert_same_bits(optimizer_tensors(fresh, names), saved)
    assert loaded["unused"] not in fresh.state

    step(parameters, optimizer, 3)
    step(loaded, fresh, 3)
    for name in parameters:
        assert torch.equal(parameters[name], loaded[name])


def test_a_loaded_optimizer_shares_no_memory_with_what_was_read():
    parameters, optimizer = parameters_and_optimizer(torch.optim.Adam)
    step(parameters, optimizer, 1)
    names = {parameter: name for name, parameter in parameters.items()}
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, names).items()}
    before = {name: tensor.clone() for name, tensor in saved.items()}
    load_optimizer_tensors(optimizer, names, saved)
    step(parameters, optimizer, 2)
    assert_same_bits(saved, before)
