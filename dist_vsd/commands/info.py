"""`dist-vsd info`: what is installed here, and who would own what."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform

from dist_vsd import __version__
from dist_vsd.commands.arguments import parse
from dist_vsd.config_files import PRESET_FOLDER, preset_names
from dist_vsd.priors.attention_names import ATTENTIONS, why_not
from dist_vsd.priors.compile_names import COMPILES, why_not_compiled

DESCRIPTION = """Show versions, devices and presets; or, with --world-size, which rank would own which particle."""
PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "peft", "nerfacc", "deepspeed", "xformers", "wandb")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfoArguments:
    """What `info` takes."""

    world_size: int = 0
    """Ranks to lay particles over; 0 shows versions instead."""
    num_particles: int = 1
    """Particles to lay over them."""
    num_views: int = 0
    """Views of each particle in an update; 0: as many as ranks share it."""
    num_shards: int = 0
    """Sets that particles are dealt to; 0: as many as there are particles for."""


def run(arguments: list[str]) -> int:
    """Run the command; see cli.main for the exit codes."""
    parsed = parse(InfoArguments, arguments, "info", DESCRIPTION)
    if not parsed.world_size and (parsed.num_particles, parsed.num_views, parsed.num_shards) != (1, 0, 0):
        raise ValueError("a layout needs the number of ranks: give --world-size")
    if parsed.world_size < 0:
        raise ValueError(f"--world-size must be at least 1, got {parsed.world_size}")
    if parsed.world_size:
        from dist_vsd.commands.estimate import layout_table
        from dist_vsd.distributed.layout import Layout

        print(layout_table(Layout.of(parsed.num_particles, parsed.world_size, 0, parsed.num_views, parsed.num_shards)))
        return 0
    import torch

    from dist_vsd.device import best_device
    from dist_vsd.kernels.choice import kernels_in_words

    print(f"dist-vsd {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"  {package:<13} {version}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    for attention in ATTENTIONS:
        print(f"attention {attention}: {why_not(attention, 'bf16') or 'there'}")
    for way in COMPILES:
        print(f"compile {way}: {why_not_compiled(way) or 'there'}")
    print(f"kernels of fields: {kernels_in_words(best_device())}")
    print(f"devices: {', '.join(gpus) or f'CPU, {torch.get_num_threads()} threads'}")
    print("presets:")
    for name in preset_names():
        first = (PRESET_FOLDER / f"{name}.yaml").read_text().splitlines()[0]
        print(f"  {name:<18} {first.lstrip('# ')}")
    return 0
