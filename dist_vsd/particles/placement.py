"""Where particles are between their turns: on the device, or in host memory so that the device holds two micro-batches at most."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_vsd.device import SideStream
from dist_vsd.particles.owned_particle import OwnedParticle


class Placement(Protocol):
    """What an update tells about the particles that it works on."""

    def fetch(self, particles: Sequence[OwnedParticle]) -> None:
        """Have particles on the device when this returns."""

    def prefetch(self, particles: Sequence[OwnedParticle]) -> None:
        """Begin to bring particles that are needed next."""

    def release(self, particles: Sequence[OwnedParticle]) -> None:
        """Say that particles have had their step."""

    def settle(self) -> None:
        """Wait until every copy is done: whoever reads particles between updates calls this first."""


class OnDevice:
    """Every particle stays on the device."""

    def fetch(self, particles: Sequence[OwnedParticle]) -> None:
        """Do nothing."""

    def prefetch(self, particles: Sequence[OwnedParticle]) -> None:
        """Do nothing."""

    def release(self, particles: Sequence[OwnedParticle]) -> None:
        """Do nothing."""

    def settle(self) -> None:
        """Do nothing."""


class Offloaded:
    """Idle particles live in host memory, pinned where there is a GPU; the next ones travel while the present ones render.

    Memory on the device then does not grow with the number of particles. Parameters, grids and Adam's moments move; the
    numbers are copied, never changed, so a run is the same to the bit with and without.

    A particle that moves is given other parameters: whoever keeps one of them between its turns keeps what was.

    Args:
        particles: all of this rank's, on the host or the device.
        device: to work on.

    Attributes:
        resident: ids of the particles that are on the device now.
        most_resident: the greatest number of them so far.
    """

    def __init__(self, particles: Iterable[OwnedParticle], device: torch.device) -> None:
        self._copies = SideStream(device)
        self._host: dict[int, dict[str, Tensor]] = {}
        self._arrived: dict[int, Any] = {}  # marks
        self.resident: set[int] = set()
        self.most_resident = 0
        for particle in particles:
            self._host[particle.id] = {}
            self._to_host(particle)

    def fetch(self, particles: Sequence[OwnedParticle]) -> None:
        """Have particles on the device when this returns (for the current stream)."""
        self.prefetch(particles)
        for particle in particles:
            self._copies.let_computation_wait(self._arrived.get(particle.id))

    def prefetch(self, particles: Sequence[OwnedParticle]) -> None:
        """Begin to bring particles that are needed next, on a stream of their own."""
        for particle in particles:
            if particle.id in self.resident:
                continue
            self.resident.add(particle.id)
            self.most_resident = max(self.most_resident, len(self.resident))
            with self._copies.queued():
                particle.replace_tensors(lambda _name, tensor: self._copies.brought(tensor))
                self._arrived[particle.id] = self._copies.mark()

    def release(self, particles: Sequence[OwnedParticle]) -> None:
        """Send particles back to the host."""
        for particle in particles:
            if particle.id in self.resident:
                self.resident.remove(particle.id)
                self._to_host(particle)

    def settle(self) -> None:
        """Wait until every copy is done."""
        self._copies.synchronize()

    def _to_host(self, particle: OwnedParticle) -> None:
        host = self._host[particle.id]

        def home(name: str, tensor: Tensor) -> Tensor:
            kept = host.get(name)
            if kept is None or kept.shape != tensor.shape:
                kept = host[name] = self._copies.home_for(tensor)
            self._copies.take_home(tensor, kept)
            return kept

        self._copies.wait_for_computation()  # the step must be done before its result travels
        with self._copies.queued():
            particle.replace_tensors(home)
