"""What a machine can do at most, measured: matrix products and copies, to which an update's own speed is compared."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch

from dist_vsd.device import is_accelerator, synchronize

REPEATS = 7
SIDES = {True: 8192, False: 1024}  # of square matrices, on an accelerator and on a CPU
COPIED_BYTES = {True: 2**31, False: 2**27}  # more than caches hold


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Medians of a machine's measured peaks.

    Attributes:
        matmul_flop_per_second: of a square matrix product in the networks' precision.
        copy_bytes_per_second: read and written, of a copy within its memory.
    """

    matmul_flop_per_second: float
    copy_bytes_per_second: float


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Measure a device's peaks.

    Args:
        device: of the networks.
        dtype: of the networks.
    """
    side, num_bytes = SIDES[is_accelerator(device)], COPIED_BYTES[is_accelerator(device)]
    a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    product = median_seconds(lambda: torch.mm(a, b), device)
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    copied = median_seconds(lambda: destination.copy_(source), device)
    return Peaks(2 * side**3 / product, 2 * num_bytes / copied)


def median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median time of some work, after a first time that does not count."""
    seconds = []
    for _ in range(REPEATS + 1):
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])
