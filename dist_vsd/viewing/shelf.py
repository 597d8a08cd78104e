"""The checkpoints of a run as a viewer takes them out: one particle at a time, read only, the last few kept open."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dist_vsd.particles.particle import Particle
from dist_vsd.particles.representations import Representation
from dist_vsd.priors.table import load_prior
from dist_vsd.runs.checkpoint import updates_in
from dist_vsd.runs.saved_run import check_particles, open_run, read_config
from dist_vsd.training.stages import stage_of_checkpoint, stages_of

MOST_OPEN = 32  # particles that are kept


@dataclasses.dataclass(frozen=True)
class Shown:
    """A particle of a checkpoint.

    Attributes:
        theta: the particle.
        row: its representation, which a stage may change.
        update: updates done.
        stage: the name of the stage that left the checkpoint.
        decode: from x_0 to pictures, for latent particles; else None.
    """

    theta: Particle
    row: Representation
    update: int
    stage: str
    decode: Callable[[Tensor], Tensor] | None


class Shelf:
    """What a run has saved so far. Any thread may ask it.

    Args:
        path: the run directory; nothing in it is written or locked.
        device: to put particles on.

    Raises:
        ValueError: no run.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        self.path, self._device = path, device
        self.config = read_config(path)
        self.updates = updates_in(path / "checkpoints")
        self._lock = threading.Lock()
        self._open: collections.OrderedDict[tuple[int, int], Shown] = collections.OrderedDict()
        self._faults: dict[tuple[int, int], str] = {}
        self._decode: Callable[[Tensor], Tensor] | None = None

    def refresh(self) -> bool:
        """Look which checkpoints there are, by their names; say whether that has changed."""
        updates = updates_in(self.path / "checkpoints")
        if updates == self.updates:
            return False
        config = read_config(self.path)  # a run that goes on may have been given more updates
        with self._lock:
            self.updates, self.config, self._faults = updates, config, {}
        return True

    def stage_name(self, update: int) -> str:
        """Return the name of the stage that left a checkpoint."""
        return stage_of_checkpoint(stages_of(self.config), update).name

    def take(self, particle: int, update: int | None) -> tuple[Shown, list[str]]:
        """Return a particle of a checkpoint, and what was passed over for it.

        Args:
            particle: its id.
            update: of the checkpoint; None for the newest that can be shown.

        Raises:
            ValueError: it is gone or damaged, or there is none.
        """
        with self._lock:
            if update is not None:
                return self._take(particle, update), []
            check_particles(self.path, self.config, (particle,))
            notes: list[str] = []
            for newest in reversed(self.updates):
                try:
                    return self._take(particle, newest), notes
                except ValueError as error:
                    notes.append(str(error))
        reason = "; ".join(notes) or "none was saved yet"
        raise ValueError(f"{self.path} has no checkpoint that can be shown ({reason}): let the run go on, or resume it")

    def _take(self, particle: int, update: int) -> Shown:
        key = (update, particle)
        if key in self._faults:
            raise ValueError(self._faults[key])
        if key not in self._open:
            try:
                saved = open_run(self.path, (particle,), self._device, update, self._decode_of(update))
            except ValueError as error:
                self._faults[key] = str(error)
                raise
            row, stage = saved.config.representation_row, self.stage_name(update)
            self._open[key] = Shown(saved.particles[particle], row, update, stage, saved.decode)
            while len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(key)
        return self._open[key]

    def _decode_of(self, update: int) -> Callable[[Tensor], Tensor] | None:
        """Return what decodes the particles of a checkpoint; the prior is loaded once, when it is first needed."""
        config = stage_of_checkpoint(stages_of(self.config), update).config
        if config.representation_row.is_latent and self._decode is None:
            self._decode = load_prior(config.prior, self._device).decode
        return self._decode if config.representation_row.is_latent else None
