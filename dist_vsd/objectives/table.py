"""Every objective in one table, a row a line: its code, whether it needs phi, and which particles it can serve.

A new one is its file and a row here. No torch is imported: a configuration asks this table what exists.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Callable
from typing import Any

from dist_vsd.objectives.objective_configs import AncestralConfig, ClipConfig, SdsConfig
from dist_vsd.particles.representations import REPRESENTATIONS, Representation


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveRow:
    """What the rest of the program knows of an objective.

    Attributes:
        made_by: "module:Class" of it; called with the run's configuration, the prior and eps_phi.
        needs_phi: whether it asks eps_phi, which is then trained along.
        serves: whether it can act on a kind of particle.
        sees: the channels of a render that it can be shown.
        section: where its own settings stand in a run's configuration; empty without any.
        config: their dataclass.
    """

    made_by: str
    needs_phi: bool = False
    serves: Callable[[Representation], bool] = lambda _representation: True
    sees: tuple[str, ...] = ("color", "normal")
    section: str = ""
    config: type | None = None

    def objective_class(self) -> Any:
        """Return its class, an Objective."""
        return pkgutil.resolve_name(self.made_by)

    @property
    def representations(self) -> list[str]:
        """The names of the representations that it serves."""
        return [name for name, row in REPRESENTATIONS.items() if self.serves(row)]


OBJECTIVES: dict[str, ObjectiveRow] = {
    "vsd": ObjectiveRow(made_by="dist_vsd.objectives.vsd:Vsd", needs_phi=True),
    "sds": ObjectiveRow(made_by="dist_vsd.objectives.sds:Sds", section="sds", config=SdsConfig),
    "denoising": ObjectiveRow(made_by="dist_vsd.objectives.denoising:Denoising"),
    # It compares pictures, and a latent is none; it puts backgrounds of its own behind colours.
    "clip": ObjectiveRow(
        made_by="dist_vsd.objectives.clip:DreamFields", serves=lambda r: not r.is_latent, sees=("color",), section="clip", config=ClipConfig
    ),
    # What is sampled is a picture, which the particle must be able to hold.
    "ancestral": ObjectiveRow(
        made_by="dist_vsd.objectives.ancestral:Ancestral", serves=lambda r: r.becomes, section="ancestral", config=AncestralConfig
    ),
}
