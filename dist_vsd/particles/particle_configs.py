"""Settings of each kind of particle. Apart from their code, so that reading a configuration imports no torch."""

from __future__ import annotations

import dataclasses

ENCODINGS = ("dense", "hash")
BACKGROUNDS = ("white", "learned", "random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseGridConfig:
    """Grids of features on cubes of rising resolution, interpolated trilinearly and concatenated."""

    resolutions: tuple[int, ...] = (12, 24, 48)
    """Vertices a side of each level."""
    num_features: int = 4
    """Features a level."""

    def __post_init__(self) -> None:
        if not self.resolutions or min(self.resolutions) < 2:
            raise ValueError(f"dense_grid.resolutions must be 2 or more each, got {self.resolutions}")
        if self.num_features < 1:
            raise ValueError(f"dense_grid.num_features must be at least 1, got {self.num_features}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashGridConfig:
    """Levels of hashed features; the defaults are ProlificDreamer's."""

    num_levels: int = 16
    """Levels, from the base resolution to the finest in geometric steps."""
    num_features: int = 2
    """Features a level."""
    log2_table_size: int = 19
    """Entries of a level's table, as a power of two; coarser levels that need fewer are dense."""
    base_resolution: int = 16
    """Cells a side of the coarsest level."""
    finest_resolution: int = 2048
    """Cells a side of the finest level."""

    def __post_init__(self) -> None:
        if min(self.num_levels, self.num_features, self.log2_table_size, self.base_resolution) < 1:
            raise ValueError(f"hash_grid counts must be at least 1, got {self}")
        if self.finest_resolution < self.base_resolution:
            raise ValueError(
                f"hash_grid.finest_resolution must be at least base_resolution, got {self.finest_resolution} < {self.base_resolution}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RadianceFieldConfig:
    """A field of density and colour in the cube [-bound, bound]^3."""

    encoding: str = "dense"
    """dense (fast on a CPU) or hash (Instant-NGP, for 512 pixels)."""
    dense_grid: DenseGridConfig = DenseGridConfig()
    """Of the encoding dense."""
    hash_grid: HashGridConfig = HashGridConfig()
    """Of the encoding hash."""
    bound: float = 1.0
    """Half the side of the cube that holds the object, scene units."""
    hidden_width: int = 32
    """Width of the MLP's one hidden layer."""
    num_samples: int = 48
    """Samples on a ray through the cube."""
    samples_per_ray: int = 0
    """Samples in occupied cells that the rays of an image have on average at most; an image with more is thinned evenly. 0: no limit."""
    visible_per_ray: int = 0
    """Likewise of those that no surface hides; 0: as samples_per_ray."""
    hidden_below: float = 0.0
    """Share of a sample's light that gets to the eye below which it is hidden and asked without a gradient alone (1e-4). 0: none is."""
    tile_points: int = 0
    """Points of a field that are held for the backward pass at once; more are asked tile by tile, and then once more. 0: all that the
    free memory of a GPU has room for, by a count at the start; on a CPU all."""
    density_strength: float = 10.0
    """Height of the density's start, softplus(raw + strength (1 - |x| / radius)): a soft ball (negative: a hollow one)."""
    density_radius: float = 0.5
    """Radius of that ball, scene units."""
    background: str = "white"
    """white, learned (a small MLP of the direction) or random (a colour drawn for each render)."""
    random_background_share: float = 0.0
    """Share of the renders that a particle learns from which lie over a random colour instead of that background (published: 0.5)."""
    encoding_lr: float = 1e-2
    mlp_lr: float = 3e-3
    background_lr: float = 1e-3
    occupancy_resolution: int = 32
    """Cells a side of the occupancy grid."""
    occupancy_every: int = 16
    """Updates between two refreshes of the occupancy grid."""
    occupancy_threshold: float = 0.01
    """A cell is empty when the opacity of one sample in it, and in its neighbours, is below this."""
    track_origin: bool = False
    """Cameras look at a moving average of the density's centre of mass, not at the cube's centre (Dream Fields' scene origin)."""
    origin_decay: float = 0.999
    """Of that average, each update."""

    def __post_init__(self) -> None:
        for name, choices in (("encoding", ENCODINGS), ("background", BACKGROUNDS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"field.{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("hidden_width", "num_samples", "occupancy_resolution", "occupancy_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"field.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("samples_per_ray", "visible_per_ray", "tile_points"):
            if getattr(self, name) < 0:
                raise ValueError(f"field.{name} must be 0 or more, got {getattr(self, name)}: raise --field.{name.replace('_', '-')}")
        for name in ("origin_decay", "random_background_share", "hidden_below"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"field.{name} must be in [0, 1], got {getattr(self, name)}: change --field.{name.replace('_', '-')}")
        if self.bound <= 0 or self.density_radius <= 0:
            raise ValueError(f"field.bound and density_radius must be positive, got {self.bound} and {self.density_radius}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """A surface on a lattice of tetrahedra; its colours, background and cube are field's."""

    resolution: int = 64
    """Cells a side of the lattice."""
    band: int = 3
    """Cells on either side of the surface that are kept."""
    band_every: int = 20
    """Updates after which the band follows the surface."""
    threshold: float = 0.0
    """Density of a radiance field at which a mesh begins, 1 / scene units; 0: found for each particle."""
    least_fragment: float = 0.05
    """Parts of the field smaller than this share of its largest part are left out."""
    distance_lr: float = 1e-2
    """Of the signed distances, cells."""
    deformation_lr: float = 3e-3
    """Of how far the lattice's vertices are moved."""

    def __post_init__(self) -> None:
        if not 8 <= self.resolution <= 512:
            raise ValueError(f"mesh.resolution must be in [8, 512], got {self.resolution}: change --mesh.resolution")
        for name in ("band", "band_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"mesh.{name} must be at least 1, got {getattr(self, name)}: raise --mesh.{name.replace('_', '-')}")
        if self.threshold < 0:
            raise ValueError(f"mesh.threshold must be 0 (found) or more, got {self.threshold}: raise --mesh.threshold")
        if not 0.0 <= self.least_fragment <= 1.0:
            raise ValueError(f"mesh.least_fragment must be in [0, 1], got {self.least_fragment}: change --mesh.least-fragment")


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """What a mesh is made by: its own settings, and those of a field for its colours, its background and its cube."""

    mesh: MeshConfig = MeshConfig()
    field: RadianceFieldConfig = RadianceFieldConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """A picture as a particle."""

    resolution: int = 64
    """Height and width of the picture, pixels."""
    lr: float = 3e-2
    """Adam's learning rate of the pixels (in logits)."""

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise ValueError(f"image.resolution must be at least 1, got {self.resolution}: raise --image.resolution")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """A latent picture as a particle."""

    channels: int = 4
    """Of the prior's latents."""
    resolution: int = 16
    """Height and width of the prior's latents (64 for Stable Diffusion at 512 pixels)."""
    initial_std: float = 1.0
    """Standard deviation of the noise that it starts from."""
    lr: float = 3e-2
    """Adam's learning rate."""

    def __post_init__(self) -> None:
        for name in ("channels", "resolution"):
            if getattr(self, name) < 1:
                raise ValueError(f"latent.{name} must be at least 1, got {getattr(self, name)}: raise --latent.{name}")
        if self.initial_std < 0:
            raise ValueError(f"latent.initial_std must be 0 or more, got {self.initial_std}: raise --latent.initial-std")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SirenConfig:
    """A picture that a network of its pixels' coordinates draws."""

    resolution: int = 64
    """Height and width at which it is rendered, pixels."""
    hidden_width: int = 64
    """Width of the hidden layers."""
    num_hidden: int = 3
    """Hidden layers."""
    first_omega: float = 15.0
    """omega_0 of the first layer: the highest frequency of the start, radians over half the picture (30 for 256 pixels and more)."""
    hidden_omega: float = 30.0
    """omega_0 of the other layers."""
    lr: float = 1e-3
    """Adam's learning rate: a step moves every pixel, so it is thirty times smaller than a picture's; from 3e-3 on it diverges."""

    def __post_init__(self) -> None:
        for name in ("resolution", "hidden_width", "num_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"siren.{name} must be at least 1, got {getattr(self, name)}: raise --siren.{name.replace('_', '-')}")
        if self.first_omega <= 0 or self.hidden_omega <= 0:
            raise ValueError(f"siren.first_omega and hidden_omega must be above 0, got {self.first_omega} and {self.hidden_omega}")
