"""Every kind of particle in one table: what makes it, its settings, and what it can do. A new one is its file and a row here.

No torch is imported here: a configuration asks this table what exists.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dist_vsd.particles.particle_configs import ImageConfig, LatentConfig, MeshConfig, MeshSettings, RadianceFieldConfig, SirenConfig

if TYPE_CHECKING:
    from dist_vsd.particles.particle import Particle

CHANNELS = ("color", "normal", "depth", "opacity")  # what a render may show (particles/channels.py makes pictures of them)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Representation:
    """What the rest of the program knows of a kind of particle.

    Attributes:
        made_by: "module:Class" of it; a name, so that its code is imported where a particle is made, and nowhere else.
        section: where its settings stand in a run's configuration.
        config: their dataclass.
        shows: what its renders have, out of CHANNELS and in their order.
        groups: names of its optimiser's groups (Particle.parameter_groups).
        is_flat: a picture, the same from every camera: its prompt has no view words, and phi is told no pose.
        is_latent: its pictures are x_0 of the prior, which needs no encoding and has to be decoded to be looked at.
        becomes: whether it can be set to a picture (``Particle.become``), such as a sample of the prior.
        is_solid: an object in a cube, before a background: it has an inside, a surface and colours, which are measured and exported.
        is_volume: a solid that is rendered by samples along rays.
        has_surface: a solid whose surface is a mesh (``surface()``).
        with_section: another section whose settings it takes beside its own: ``joined(own, other)`` is what it is made by.
    """

    made_by: str
    section: str
    config: type
    shows: tuple[str, ...]
    groups: tuple[str, ...]
    is_flat: bool = False
    is_latent: bool = False
    becomes: bool = False
    is_solid: bool = False
    is_volume: bool = False
    has_surface: bool = False
    with_section: str = ""
    joined: Callable[[Any, Any], Any] | None = None

    @property
    def channels(self) -> list[str]:
        """What of it an objective may see as a picture."""
        return [channel for channel in ("color", "normal") if channel in self.shows]

    def particle_class(self) -> type[Particle]:
        """Return the class of its particles."""
        return pkgutil.resolve_name(self.made_by)

    def settings(self, config: Any) -> Any:
        """Return what its particles are made by: its section of a run's configuration."""
        own = getattr(config, self.section)
        return own if self.joined is None else self.joined(own, getattr(config, self.with_section))


REPRESENTATIONS: dict[str, Representation] = {
    "radiance_field": Representation(
        made_by="dist_vsd.particles.radiance_field:RadianceField",
        section="field",
        config=RadianceFieldConfig,
        shows=CHANNELS,
        groups=("encoding", "mlp", "background"),
        is_solid=True,
        is_volume=True,
    ),
    "mesh": Representation(
        made_by="dist_vsd.particles.mesh:MeshParticle",
        section="mesh",
        config=MeshConfig,
        shows=CHANNELS,
        groups=("distance", "deformation", "encoding", "mlp", "background"),
        is_solid=True,
        has_surface=True,
        with_section="field",
        joined=MeshSettings,
    ),
    "image": Representation(
        made_by="dist_vsd.particles.image:ImageParticle",
        section="image",
        config=ImageConfig,
        shows=("color",),
        groups=("pixels",),
        is_flat=True,
        becomes=True,
    ),
    "latent": Representation(
        made_by="dist_vsd.particles.latent:LatentParticle",
        section="latent",
        config=LatentConfig,
        shows=("color",),
        groups=("latent",),
        is_flat=True,
        is_latent=True,
        becomes=True,
    ),
    "siren": Representation(
        made_by="dist_vsd.particles.siren:SirenParticle",
        section="siren",
        config=SirenConfig,
        shows=("color",),
        groups=("network",),
        is_flat=True,
    ),
}
