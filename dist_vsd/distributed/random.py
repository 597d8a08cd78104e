"""Random numbers keyed by what they are for, never by the rank that draws them.

Any layout of particles over ranks, and any resumed run, therefore draws the same numbers. Generators live on the CPU;
what they draw is moved to the device afterwards, so that a GPU sees the same numbers as well.

torch's CPU generator is MT19937 (Matsumoto and Nishimura 1998), and manual_seed() starts it from 32 bits alone: two keys of
some 65,000 would share a stream, and a run draws by millions. So a key is expanded to the whole state, 624 words of 32 bits.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from typing import Literal

import numpy as np
import torch
from torch import Tensor

# The bytes of torch's state: seed u64, draws left before the next twist i32, whether it is seeded i32, place in the words u64, the
# words as u64 each, and what normal draws keep (aten/src/ATen/CPUGeneratorImpl.cpp; checked at first use).
_HEAD = struct.Struct("=QiiQ")
_NUM_WORDS, _NUM_BYTES = 624, 5056
_WORDS = slice(_HEAD.size, _HEAD.size + 8 * _NUM_WORDS)

# One name for each draw of the project: a camera of a particle, its t and eps, phi's own t' and eps', and so on.
Purpose = Literal[
    "initialize_theta",
    "initialize_phi",
    "camera",
    "ray_jitter",
    "background",
    "occupancy",
    "timestep",
    "noise",
    "phi_timestep",
    "phi_noise",
    "pose_dropout",
    "chosen_particles",
    "augmentation",
    "ancestral",
]


def keyed_generator(
    seed: int, purpose: Purpose, *, particle: int = 0, shot: int = 0, update: int = 0, step: int = 0
) -> torch.Generator:
    """Return a CPU generator for one purpose of one shot of one particle at one update.

    Args:
        seed: of the run.
        purpose: what the numbers are for.
        particle: id of the particle, counted over the whole run.
        shot: number of the particle's shot within the update.
        update: index of the update, from 0.
        step: index of phi's step within the update.

    Returns:
        A generator whose stream is independent of those with any other key: its 19,937 bits of state are SHAKE-256 of the key.

    Raises:
        RuntimeError: this torch lays its generator's state out in another way.
    """
    key = f"{seed}/{purpose}/{particle}/{shot}/{update}/{step}".encode()
    stream = hashlib.shake_256(key).digest(8 + 4 * _NUM_WORDS)
    state = _fresh_state().clone()
    content = state.numpy()
    content[:8] = np.frombuffer(stream, np.uint8, 8)  # initial_seed(), from which torch draws nothing
    content[_WORDS].view(np.uint64)[:] = np.frombuffer(stream, "<u4", _NUM_WORDS, 8)
    generator = torch.Generator()
    generator.set_state(state)
    return generator


@functools.cache
def _fresh_state() -> Tensor:
    """Return the (5056,) bytes of a generator that has drawn nothing, once their layout is known to be the expected one."""
    seed = 5489
    state = torch.Generator().manual_seed(seed).get_state()
    check_layout(state, seed)
    return state


def check_layout(state: Tensor, seed: int) -> None:
    """Refuse the state of a generator, fresh from a seed, unless it is laid out as keyed_generator writes it.

    Args:
        state: bytes, of manual_seed(seed).
        seed: below 2^32, for which numpy's MT19937 starts with the same words.

    Raises:
        RuntimeError: it is laid out in another way.
    """
    content = state.numpy()
    words = np.random.RandomState(seed).get_state()[1]
    as_expected = (
        len(content) == _NUM_BYTES
        and _HEAD.unpack_from(content) == (seed, 1, 1, 0)
        and np.array_equal(content[_WORDS].view(np.uint64), words)
    )
    if not as_expected:
        raise RuntimeError(
            f"the state of torch {torch.__version__}'s CPU generator must be {_NUM_BYTES} bytes with MT19937's {_NUM_WORDS} words from "
            f"byte {_HEAD.size} on, got {len(content)} bytes laid out otherwise: use a version of torch that setup.cfg names"
        )
