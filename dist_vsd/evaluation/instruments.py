"""Which instruments there are, what each needs, and which of them can serve a run."""

from __future__ import annotations

import dataclasses

from dist_vsd.evaluation.dino import DinoEncoder
from dist_vsd.evaluation.fid import is_available
from dist_vsd.evaluation.lpips import Lpips
from dist_vsd.evaluation.metric_names import METRICS, ONLY_WHEN_ASKED
from dist_vsd.evaluation.prior_samples import PriorSamples
from dist_vsd.evaluation.question import read_caption
from dist_vsd.priors.clip import ClipScorer
from dist_vsd.runs.saved_run import SavedRun

NEED_CLIP = ("clip", "r_precision", "entropy", "diversity", "multi_face", "recognition", "t3bench", "samples")
NO_CLIP = "none lies beside the prior; give --clip FOLDER, or a hub id"
NEED_TWO_PARTICLES = ("diversity", "dino", "lpips")
NEED_POSES = ("multi_face", "t3bench")
NEED_VOLUME = ("overlap", "chamfer")
NEED_WORDS = ("recognition", "overlap", "chamfer", "samples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruments:
    """What pictures are judged by.

    Attributes:
        metrics: names out of METRICS; those that need what is missing are left out.
        scorer: the CLIP, or None.
        in_embedded_language: whether the prior is the embedded one, whose captions, objects and scenes are known.
        prompts: of the set that R-precision is told from; empty: the captions of the embedded language.
        dino: or None.
        lpips: or None.
        samples: draws from the prior, or None.
        elevations_deg: of the turns from which 3D particles are looked at, degrees.
        num_azimuths: of each turn.
        sphere_subdivisions: of t3bench's icosphere.
    """

    metrics: tuple[str, ...] = tuple(METRICS)
    scorer: ClipScorer | None = None
    in_embedded_language: bool = False
    prompts: tuple[str, ...] = ()
    dino: DinoEncoder | None = None
    lpips: Lpips | None = None
    samples: PriorSamples | None = None
    elevations_deg: tuple[float, ...] = (15.0,)
    num_azimuths: int = 24
    sphere_subdivisions: int = 1

    def missing(self, metric: str) -> str:
        """Return what a metric needs and was not given, with the remedy; empty if it has all."""
        if metric in NEED_CLIP and self.scorer is None:
            return f"a CLIP: {NO_CLIP}"
        if metric == "dino" and self.dino is None:
            return "weights: give --dino FOLDER"
        if metric == "lpips" and self.lpips is None:
            return "weights: give --lpips FILE"
        if metric in ONLY_WHEN_ASKED and self.samples is None:
            return "samples of the prior: ask for it by name"
        if metric == "fid" and not is_available():
            return "torchmetrics, which is not installed: pip install 'dist_vsd[evaluate]'"
        if metric == "fid" and self.scorer is None and self.dino is None:
            return "features to compare: give --clip or --dino"
        return ""

    def unfit(self, metric: str, saved: SavedRun) -> str:
        """Return why a metric has no meaning for a run; empty if it has."""
        config = saved.config
        words = read_caption(config.prompt) if self.in_embedded_language else None
        if metric in NEED_TWO_PARTICLES and config.num_particles < 2:
            return "two particles"
        if (metric in NEED_POSES and config.is_flat) or (metric in NEED_VOLUME and not config.representation_row.is_solid):
            return "3D particles"
        if metric == "chamfer" and not config.representation_row.has_surface:
            return "meshes"
        if metric in NEED_WORDS and words is None:
            return "the embedded prior and a prompt out of its captions"
        if metric in ("r_precision", "entropy") and words is None and set(self.prompts) <= {config.prompt}:
            return "other prompts: give --prompts FILE, or several runs"
        if metric == "fid" and config.is_flat and config.num_particles < 2:
            return "two pictures"
        return ""
