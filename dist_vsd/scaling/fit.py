"""What a run's ranks need of memory, by the cost model and one small render, and what of it would fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from dist_vsd.cameras import turntable
from dist_vsd.config import RunConfig, flag
from dist_vsd.distributed.layout import Layout
from dist_vsd.distributed.random import keyed_generator
from dist_vsd.errors import is_out_of_memory
from dist_vsd.particles.particle import Particle
from dist_vsd.scaling.cost_model import NUMBER_BYTES, Sizes, most_particles, most_renders, rank_memory_bytes
from dist_vsd.scaling.counted_memory import CountedMemory
from dist_vsd.scaling.memory import Memory, in_words

if TYPE_CHECKING:
    from dist_vsd.training.state import TrainingState

TRIAL_SIZES = (16, 48)  # pixels a side: from there on all that a render holds is a line in its number of pixels
PARTICLE_OBJECT_BYTES = 8192  # of main memory, at least, that a particle takes however few numbers it has
SPARED = 0.3  # of the free memory, for libraries, gaps between blocks, and an estimate that is too low
# What an update took over the graphs of its renders, for gradients on the way back and what an allocator keeps: 1.30 to 1.36 at
# 64 to 256 pixels (resident memory; preset embedded, 2 to 8 particles on a CPU).
WAY_BACK = 1.35
CERTAINTY = 4  # an estimate of a render is right to within this factor: cameras and jitter differ


@dataclasses.dataclass(frozen=True)
class RenderBytes:
    """Bytes that one render holds on its way, fixed and a pixel."""

    fixed: float
    of_pixel: float

    def at(self, size: int) -> float:
        """Return those of a render of size x size pixels."""
        return self.fixed + self.of_pixel * size**2


def measure_render(theta: Particle, config: RunConfig, with_gradient: bool = True, channel: str = "") -> RenderBytes:
    """Render a particle twice, tiny, and return the line through what both held at their peak.

    Args:
        theta: left as it is.
        config: of its run, for the middle of the cameras.
        with_gradient: whether it is rendered to be optimised, and the way back counts too.
        channel: that is looked at; by default the one that the run supervises.
    """
    device, peaks = next(theta.parameters()).device, []
    cameras = turntable(1, 15.0, sum(config.camera.distance) / 2, sum(config.camera.fov_deg) / 2).to(device)
    for size in TRIAL_SIZES:
        with torch.set_grad_enabled(with_gradient), CountedMemory() as count:
            theta.render(cameras, size).channel("normal" if (channel or config.supervise) == "normal" else "color")
        peaks.append(count.peak_bytes * (WAY_BACK if with_gradient else 1.0))
    small, large = (size**2 for size in TRIAL_SIZES)
    of_pixel = max(0.0, (peaks[1] - peaks[0]) / (large - small))
    return RenderBytes(max(0.0, peaks[0] - of_pixel * small), of_pixel)


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a run needs of its ranks.

    Attributes:
        config: of the run.
        layout: of its particles.
        sizes: of theta, phi and the frozen networks; without activations.
        render: what one render holds on its way to the score, its encoding included where that is known.
    """

    config: RunConfig
    layout: Layout
    sizes: Sizes
    render: RenderBytes

    @staticmethod
    def of(config: RunConfig, layout: Layout, device: torch.device, state: TrainingState | None = None) -> Needs:
        """Find out, by a particle that is made for it.

        Args:
            config: of the run.
            layout: of its particles.
            device: of this rank.
            state: of this rank if it was made: what the prior and phi take is known then.
        """
        theta = one_particle(config, device)
        render, prior_bytes, phi_numbers = measure_render(theta, config), None, 0
        if state is not None:
            prior_bytes = float(state.prior.num_bytes)
            phi_numbers = sum(tensor.numel() for tensor in state.phi.score.phi().values()) if state.phi is not None else 0
            render = dataclasses.replace(render, fixed=render.fixed + _encoder_bytes(state))
        numbers = sum(parameter.numel() for parameter in theta.parameters())
        return Needs(config, layout, Sizes(numbers, phi_numbers, prior_bytes, None), render)

    def parts(self, **changed: int) -> dict[str, float]:
        """Return the bytes that the fullest rank holds, by what holds them.

        Args:
            changed: fields of the configuration (render_size, micro_batch_size, num_particles) with values to try.
        """
        config = dataclasses.replace(self.config, **{name: value for name, value in changed.items() if name != "num_particles"})
        layout = dataclasses.replace(self.layout, num_particles=changed.get("num_particles", self.layout.num_particles))
        sizes = dataclasses.replace(self.sizes, render_bytes=self.render.at(config.render_size))
        parts = rank_memory_bytes(layout, sizes, config.micro_batch_size, config.particles.offload)
        return {name: num_bytes for name, num_bytes in parts.items() if num_bytes is not None}

    def total(self, **changed: int) -> float:
        """Return the bytes of all ``parts``."""
        return sum(self.parts(**changed).values())

    def advice(self, memory: Memory) -> str:
        """Say which value of which flag would fit into the free memory of a rank.

        Args:
            memory: as it was before the run took any.
        """
        need, budget = self.total(), (1 - SPARED) * memory.free
        parts = ", ".join(f"{name} {in_words(num_bytes)}" for name, num_bytes in self.parts().items() if num_bytes)
        text = f"a rank is estimated to need {in_words(need)} ({parts})"
        if need <= budget:  # something that the estimate does not count, or other programs
            text, budget = f"{text}, which was too low; to be safe", 0.5 * need
        fitting = [f"{flag(name)} {value}" for name, value in self._largest(budget).items() if value]
        if not fitting:
            return f"{text}; no smaller value of one flag is enough: lower --num-particles, --render-size and --micro-batch-size together"
        return f"{text}; by the estimate it fits with {' or with '.join(fitting)}"

    def _largest(self, budget: float) -> dict[str, int]:
        """Return, for each field that could be lowered alone, its largest smaller value that the estimate says fits; 0 if none does."""
        together = min(self.config.micro_batch_size, most_renders(self.layout))
        shards = self.layout.num_shards
        particles = largest(most_particles(self.layout) - 1, lambda each: self.total(num_particles=each * shards) <= budget)
        return {
            "render_size": largest(self.config.render_size - 1, lambda size: self.total(render_size=size) <= budget),
            "micro_batch_size": largest(together - 1, lambda size: self.total(micro_batch_size=size) <= budget),
            "num_particles": particles * shards,
        }


@dataclasses.dataclass(frozen=True)
class SizeFlag:
    """A flag of a command that decides how much memory it takes.

    Attributes:
        name: of the flag.
        value: that it has.
        needs: estimated bytes, by its value.
    """

    name: str
    value: int
    needs: Callable[[int], float]

    def advice(self, memory: Memory) -> str:
        """Say which smaller value would fit into the free memory."""
        need, budget = self.needs(self.value), (1 - SPARED) * memory.free
        fitting = largest(self.value - 1, lambda value: self.needs(value) <= min(budget, 0.5 * need))
        remedy = f"by the estimate {self.name} {fitting} fits" if fitting else f"no smaller {self.name} fits: give it more memory"
        return f"{self.name} {self.value} is estimated to take {in_words(need)}; {remedy}"

    def require_fit(self, memory: Memory) -> None:
        """Refuse a value for which all memory would be too little, even if the estimate is several times too high.

        Raises:
            ValueError: what it takes, what there is, and what would fit.
        """
        if self.needs(self.value) / CERTAINTY > memory.total:
            raise ValueError(f"{self.name} {self.value} can't fit, {memory.where} has {in_words(memory.total)}: {self.advice(memory)}")


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number from 1 to ``most`` that fits, where all smaller ones do too; 0 if there is none."""
    low, high = 0, max(0, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def one_particle(config: RunConfig, device: torch.device) -> Particle:
    """Make a particle like those of a run.

    Raises:
        ValueError: not even one fits into memory.
    """
    row = config.representation_row
    try:
        return row.particle_class()(row.settings(config), keyed_generator(config.seed, "initialize_theta", particle=0)).to(device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(f"not even one particle fits into memory: lower the sizes of --{row.section}") from error


def _encoder_bytes(state: TrainingState) -> float:
    """Return what the encoder holds of one render, with the graph back to it."""
    if state.config.representation_row.is_latent or not state.objective.asks_prior:
        return 0.0
    image = torch.zeros(1, 3, TRIAL_SIZES[0], TRIAL_SIZES[0], device=state.prior.device, requires_grad=True)
    with CountedMemory() as count:
        state.prior.encode(image)
    return float(count.peak_bytes)


def require_fit(needs: Needs, memory: Memory) -> None:
    """Refuse what can't fit into the memory of a rank whatever else is there; what is near it is tried.

    Args:
        needs: of a run.
        memory: of this rank's device.

    Raises:
        ValueError: which flag asks for how much, what there is, and what would fit.
    """
    config, layout, host = needs.config, needs.layout, Memory.of("cpu")
    particles = most_particles(layout)
    theta = 3 * NUMBER_BYTES * needs.sizes.theta_numbers * particles  # itself and two moments, once all have taken a step
    of_particles = f"--num-particles {layout.num_particles}: the particles of a rank"
    # A run that goes on knows what is empty in its particles, and may need less than the first update of a new one.
    is_new = not (config.resume or config.start_from)
    least = [
        (of_particles, PARTICLE_OBJECT_BYTES * particles, host),
        (of_particles, theta, host if config.particles.offload else memory),
        (f"--render-size {config.render_size}: one render", needs.render.at(config.render_size) / CERTAINTY * is_new, memory),
    ]
    for what, num_bytes, there in least:
        if num_bytes > there.total:
            takes = f"takes at least {in_words(num_bytes)}, {there.where} has {in_words(there.total)}"
            raise ValueError(f"{what} can't fit: that {takes}; {needs.advice(memory)}")
