"""Shapes alone: what is remembered of an operation is what it makes."""

import itertools

import pytest
import torch

from dist_vsd.config_files import load_preset, merge
from dist_vsd.distributed.layout import Layout
from dist_vsd.scaling import shapes
from dist_vsd.scaling.counted_memory import CountedMemory
from dist_vsd.scaling.counted_work import CountedWork
from dist_vsd.scaling.shapes import shapes_alone
from dist_vsd.training.state import build_state
from dist_vsd.training.update import update

META = torch.device("meta")


def blank(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device=META)


def described(value):
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device, value.untyped_storage().nbytes()
    return [described(part) for part in value]


OPERATIONS = {
    "a product": lambda: blank(3, 4) @ blank(4, 5),
    "a product of another type": lambda: blank(3, 4, dtype=torch.bfloat16) @ blank(4, 5, dtype=torch.bfloat16),
    "a sum over one axis": lambda: blank(3, 4).sum(0),
    "a sum over the other": lambda: blank(3, 4).sum(1),
    "a whole number added": lambda: blank(3, dtype=torch.int64) + 1,
    "a fraction added": lambda: blank(3, dtype=torch.int64) + 1.0,
    "true added": lambda: blank(3, dtype=torch.int64) + True,
    "strides that are kept": lambda: blank(3, 4).t() * 2,
    "several results": lambda: blank(3, 4).topk(2),
    "a view": lambda: blank(3, 4)[1:],
    "a view that torch does not call one": lambda: torch.ops.aten._unsafe_view(blank(3, 4), [4, 3]),
    "a list of views": lambda: blank(6, 4).split(2),
    "joined": lambda: torch.cat([blank(3, 4), blank(2, 4)]),
    "what is not zero": lambda: blank(3, 4).nonzero(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_remembered_is_what_torch_says(name):
    with shapes_alone(remembers=False):
        told = described(OPERATIONS[name]())
    with shapes_alone():
        assert [described(OPERATIONS[name]()) for _ in range(3)] == [told] * 3


def test_what_is_made_again_is_new_and_what_is_written_to_is_the_same():
    given = blank(3, 4)
    with shapes_alone():
        results = [given * 2 for _ in range(3)]
        assert all(one is not other and not one._is_view() for one, other in itertools.combinations(results, 2))
        version = given._version
        assert all(given.add_(1.0) is given for _ in range(3))
        assert given._version == version + 3


def test_shapes_that_do_not_fit_are_refused_each_time():
    with shapes_alone():
        for _ in range(2):
            with pytest.raises(RuntimeError, match="same reduction dim"):
                blank(3, 4) @ blank(3, 4)


def counts_of(remembers):
    config = merge(load_preset("embedded"), {"prompt": "a duck", "prior": "random:tiny", "num_particles": 2}, "test")
    with shapes_alone(remembers):
        state = build_state(config, Layout.of(2), META)
        with CountedMemory(META) as memory, CountedWork() as work:
            update(state, 0)
    return memory.peak_bytes, memory.peaks, work.flop, work.bytes, work.num_operations


def test_an_update_is_counted_the_same_with_what_is_remembered_and_without(monkeypatch):
    monkeypatch.setattr(shapes, "_known", {})
    told = counts_of(remembers=False)
    assert not shapes._known
    assert counts_of(remembers=True) == told
    assert shapes._known
    assert counts_of(remembers=True) == told
