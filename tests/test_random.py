"""distributed/random.py: numbers depend on their key, on all of it, and on nothing else."""

import typing

import pytest
import torch

from dist_vsd.distributed.random import Purpose, keyed_generator

KEY = {"seed": 3, "purpose": "noise", "particle": 4, "view": 5, "update": 6, "step": 7}


def numbers(**changes):
    return torch.rand(4, generator=keyed_generator(**(KEY | changes)))


def test_the_same_key_gives_the_same_numbers():
    assert torch.equal(numbers(), numbers())


@pytest.mark.parametrize("field", ["seed", "particle", "view", "update", "step"])
def test_a_change_of_any_number_of_the_key_changes_the_numbers(field):
    assert not torch.equal(numbers(), numbers(**{field: KEY[field] + 1}))


def test_every_purpose_has_numbers_of_its_own():
    purposes = typing.get_args(Purpose)
    assert len({tuple(numbers(purpose=purpose).tolist()) for purpose in purposes}) == len(purposes)


def test_digits_never_run_together_between_the_fields():
    assert not torch.equal(numbers(particle=1, view=12), numbers(particle=11, view=2))
    assert not torch.equal(numbers(update=1, step=10), numbers(update=11, step=0))


def test_neighbouring_keys_are_uncorrelated():
    drawn = torch.stack([torch.randn(1000, generator=keyed_generator(0, "noise", update=u), dtype=torch.float64) for u in range(8)])
    correlation = torch.corrcoef(drawn) - torch.eye(8, dtype=torch.float64)
    # A correlation of 1,000 independent pairs has a standard deviation of 0.032; four of them, for the largest of 28.
    assert float(correlation.abs().max()) < 0.128


def test_the_numbers_of_a_key_are_pinned():
    """A change of the scheme would silently make every resumed run another one: bump the checkpoint's version with it."""
    # blake2b of the key, little end first, without its lowest bit: 64 bits made to fit torch's signed seed.
    assert keyed_generator(0, "noise").initial_seed() == 8_298_507_272_132_640_437
    drawn = torch.rand(3, generator=keyed_generator(0, "noise"), dtype=torch.float64)
    assert drawn.tolist() == [0.5787563316183876, 0.7485532257615035, 0.42655732520757683]


def test_the_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(1)
    state, first = torch.get_rng_state(), numbers()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(numbers(), first)
