"""Compiling a network by region: torch.compile of each block that is repeated, with fixed shapes, so that one compilation serves all alike.

A whole UNet takes a compiler minutes, and one of its blocks seconds; blocks of the same shapes share what was compiled, as their weights
are arguments. What is compiled is kept in the user's cache folder, so that a second start only reads it.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from dist_vsd.cache_folder import cache_folder
from dist_vsd.priors.cuda_graphs import Graphed
from dist_vsd.priors.replay import Replayed

REGIONS = (BasicTransformerBlock, ResnetBlock2D)
# Variants of a block's code: widths, sizes of pictures and batches, with LoRA and without, with a gradient and without. An XL UNet and its
# VAE have some 60; beyond torch's limit of 8 it would silently stop compiling.
MOST_VARIANTS = 256
FOLDER = "TORCHINDUCTOR_CACHE_DIR"
BACKEND = "inductor"  # of torch.compile: C++ on CPUs, Triton on GPUs


@dataclasses.dataclass
class Compilations:
    """What was compiled in this process.

    Attributes:
        seconds: spent on it, backward passes included.
        compiled: regions that were compiled.
        found: regions that were found in the cache folder instead.
    """

    seconds: float = 0.0
    compiled: int = 0
    found: int = 0
    _begin: float = 0.0
    _told: float = 0.0
    _is_listening: bool = False

    def listen(self) -> None:
        """Begin to count."""
        if self._is_listening:
            return
        from torch._dynamo.callback import callback_handler

        self._is_listening = True
        callback_handler.register_start_callback(self._started)
        callback_handler.register_end_callback(self._ended)

    def _started(self, *_: object) -> None:
        self._begin = time.perf_counter()

    def _ended(self, *_: object) -> None:
        from torch._dynamo.utils import counters

        self.seconds += time.perf_counter() - self._begin
        self.compiled, self.found = (counters["inductor"][f"fxgraph_cache_{what}"] for what in ("miss", "hit"))

    def news(self) -> list[str]:
        """Return a line if something was compiled since this was last asked."""
        if self.seconds == self._told:
            return []
        more, self._told = self.seconds - self._told, self.seconds
        where = f"in {os.environ.get(FOLDER, 'its folder')}"
        return [f"compiling took {more:.1f} s; regions so far: {self.compiled} compiled, {self.found} found {where}"]


compilations = Compilations()


def compile_regions(network: nn.Module) -> None:
    """Compile the blocks of a network that are repeated, each when it is first called with a shape, forward and backward.

    Args:
        network: of diffusers; changed in place. Weights, names and adapters stay as they are, and adapters may come later.
    """
    _use_folder()
    compilations.listen()
    torch._dynamo.config.recompile_limit = max(MOST_VARIANTS, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.accumulated_recompile_limit = max(4 * MOST_VARIANTS, torch._dynamo.config.accumulated_recompile_limit)
    for module in network.modules():
        if isinstance(module, REGIONS):
            module.forward = torch.compile(module.forward, dynamic=False, backend=BACKEND)  # not the module: hooks and names stay outside


def repeated(function: Callable[..., Tensor], way: str) -> Callable[..., Tensor]:
    """Return a function to be called again and again by the way in which its network is compiled.

    Args:
        function: of tensors (or None in place of one) to a tensor; see Replayed and Graphed.
        way: one of COMPILES.
    """
    if way == "regions":
        return function
    return Graphed(function) if way == "graphs" else Replayed(function)


def _use_folder() -> None:
    """Keep what is compiled in our cache folder, unless the user has named another; torch's own is in /tmp, which a restart empties."""
    folder = cache_folder()
    if folder is None:
        return
    os.environ.setdefault(FOLDER, str(Path(folder, "compiled")))
