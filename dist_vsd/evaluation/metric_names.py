"""The names of the metrics, and the figures that each gives. Apart from their code, so that the command line needs no networks for them."""

from __future__ import annotations

METRICS: dict[str, tuple[str, ...]] = {
    "clip": ("clip/score",),
    "r_precision": ("clip/r_precision",),
    "entropy": ("clip/quality_bits", "clip/variety_bits"),
    "diversity": ("particles/diversity",),
    "multi_face": ("particles/multi_face_rate",),
    "recognition": (
        "recognition/object",
        "recognition/color",
        "recognition/view",
        "recognition/color_bits",
        "recognition/view_bits",
    ),
    "overlap": ("overlap/iou",),
    "chamfer": ("chamfer/distance", "chamfer/normal_consistency"),
    "t3bench": ("t3bench/quality",),
    "dino": ("particles/diversity_dino",),
    "lpips": ("particles/lpips",),
    "texture": ("particles/finest_octave",),
    "samples": (
        "samples/color_bits",
        "samples/color_distance",
        "samples/view_bits",
        "samples/view_distance",
        "samples/diversity",
        "samples/finest_octave",
        "samples/nearest",
        "samples/nearest_of_themselves",
    ),
    "fid": ("samples/fid_clip", "samples/fid_dino"),
}
# These draw samples from the prior, which takes longer than all the rest: only when they are asked for.
ONLY_WHEN_ASKED = ("samples", "fid")
EVALUATION_FILE = "evaluation.json"  # of a run directory
