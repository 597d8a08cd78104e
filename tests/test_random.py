"""distributed/random.py: numbers depend on their key, on all of it, and on nothing else."""

import hashlib
import typing

import numpy as np
import pytest
import torch

from dist_vsd.distributed.random import Purpose, check_layout, keyed_generator

KEY = {"seed": 3, "purpose": "noise", "particle": 4, "shot": 5, "update": 6, "step": 7}


def numbers(**changes):
    return torch.rand(4, generator=keyed_generator(**(KEY | changes)))


def test_the_same_key_gives_the_same_numbers():
    assert torch.equal(numbers(), numbers())


@pytest.mark.parametrize("field", ["seed", "particle", "shot", "update", "step"])
def test_a_change_of_any_number_of_the_key_changes_the_numbers(field):
    assert not torch.equal(numbers(), numbers(**{field: KEY[field] + 1}))


def test_every_purpose_has_numbers_of_its_own():
    purposes = typing.get_args(Purpose)
    assert len({tuple(numbers(purpose=purpose).tolist()) for purpose in purposes}) == len(purposes)


def test_digits_never_run_together_between_the_fields():
    assert not torch.equal(numbers(particle=1, shot=12), numbers(particle=11, shot=2))
    assert not torch.equal(numbers(update=1, step=10), numbers(update=11, step=0))


def test_neighbouring_keys_are_uncorrelated():
    drawn = torch.stack([torch.randn(1000, generator=keyed_generator(0, "noise", update=u), dtype=torch.float64) for u in range(8)])
    correlation = torch.corrcoef(drawn) - torch.eye(8, dtype=torch.float64)
    # A correlation of 1,000 independent pairs has a standard deviation of 0.032; four of them, for the largest of 28.
    assert float(correlation.abs().max()) < 0.128


def seed_of_64_bits(update):
    """Return 63 bits of a hash of a key, of which manual_seed() keeps the lowest 32."""
    return int.from_bytes(hashlib.blake2b(f"0/noise/0/0/{update}/0".encode(), digest_size=8).digest(), "little") >> 1


def keys_that_32_bits_confuse():
    """Return the first two updates whose keys agree in 32 bits of a hash: some 80,000 make it likely, 200,000 all but certain."""
    seen = {}
    for update in range(200_000):
        other = seen.setdefault(seed_of_64_bits(update) & 0xFFFFFFFF, update)
        if other != update:
            return other, update
    raise AssertionError("no two agree")


def test_keys_that_agree_in_32_bits_of_a_hash_draw_different_numbers():
    pair = keys_that_32_bits_confuse()
    one, other = (torch.rand(4, generator=torch.Generator().manual_seed(seed_of_64_bits(update))) for update in pair)
    assert torch.equal(one, other)  # what a seed would do to them
    one, other = (torch.rand(4, generator=keyed_generator(0, "noise", update=update)) for update in pair)
    assert not torch.equal(one, other)


def words_of(key):
    """Return the 32-bit outputs of numpy's MT19937 whose 624 words are SHAKE-256 of a key, after its first 8 bytes."""
    twister = np.random.MT19937()
    words = np.frombuffer(hashlib.shake_256(key).digest(8 + 4 * 624), "<u4", offset=8)
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    return twister.random_raw(2000)


def test_the_generator_is_mt19937_with_all_of_its_state_from_the_key():
    drawn = torch.rand(2000, generator=keyed_generator(3, "noise", particle=4, shot=5, update=6, step=7))
    # torch's uniform fp32 is the lowest 24 bits of an output, / 2^24; 2,000 of them go through three twists of the state.
    expected = (words_of(b"3/noise/4/5/6/7") & 0xFFFFFF).astype(np.float32) / 2**24
    assert torch.equal(drawn, torch.from_numpy(expected))


def test_normal_numbers_are_standard_and_repeat():
    drawn = torch.randn(100_000, generator=keyed_generator(**KEY), dtype=torch.float64)
    assert torch.equal(drawn, torch.randn(100_000, generator=keyed_generator(**KEY), dtype=torch.float64))
    # Four standard deviations of the estimates: 1 / sqrt(n), sqrt(2 / n) and, of the fourth moment, sqrt(96 / n).
    assert float(drawn.mean()) == pytest.approx(0, abs=0.013)
    assert float(drawn.var()) == pytest.approx(1, abs=0.018)
    assert float((drawn**4).mean()) == pytest.approx(3, abs=0.13)


def test_an_odd_number_of_normal_draws_leaves_nothing_for_another_key():
    """torch keeps the second number of a pair in its generator's state."""
    first = torch.randn(3, generator=keyed_generator(**KEY))
    torch.randn(1, generator=keyed_generator(0, "camera"))
    assert torch.equal(torch.randn(3, generator=keyed_generator(**KEY)), first)


def another_layout():
    state = torch.Generator().manual_seed(9).get_state()
    moved = torch.cat([state[:24], state[32:], state[24:32]])
    return {"shorter": state[:-8], "words elsewhere": moved, "another head": state.roll(4)}


@pytest.mark.parametrize("kind", ["shorter", "words elsewhere", "another head"])
def test_another_layout_of_torchs_state_is_refused(kind):
    check_layout(torch.Generator().manual_seed(9).get_state(), 9)
    with pytest.raises(RuntimeError, match=r"must be 5056 bytes with MT19937's 624 words from byte 24 on, got 50\d\d bytes"):
        check_layout(another_layout()[kind], 9)


def test_the_numbers_of_a_key_are_pinned():
    """A change of the scheme would silently make every resumed run another one: bump the checkpoint's version with it."""
    drawn = torch.rand(3, generator=keyed_generator(0, "noise"), dtype=torch.float64)
    # By numpy's MT19937 too: the lowest 53 bits of two outputs, the first of them above, / 2^53.
    assert drawn.tolist() == [0.3831308270756987, 0.4650060184331979, 0.7402254450933261]


def test_the_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(1)
    state, first = torch.get_rng_state(), numbers()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(numbers(), first)
