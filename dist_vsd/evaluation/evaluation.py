"""Evaluating a run, or any pictures, with the instruments at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.evaluation.clip_figures import ClipSums, diversity, figures_of
from dist_vsd.evaluation.distributions import expected_entropy_bits, total_variation
from dist_vsd.evaluation.fid import frechet_distance
from dist_vsd.evaluation.instruments import Instruments
from dist_vsd.evaluation.judge import ClipJudge, Verdict
from dist_vsd.evaluation.metric_names import METRICS
from dist_vsd.evaluation.overlap import best_overlap
from dist_vsd.evaluation.question import Question, ask
from dist_vsd.evaluation.scene_surface import surface_distance
from dist_vsd.evaluation.sphere_quality import sphere_quality
from dist_vsd.evaluation.texture import finest_octave, nearest_distance, nearest_distance_of_themselves
from dist_vsd.evaluation.views import capture, sphere, turns
from dist_vsd.priors.embedded.captions import all_pairs
from dist_vsd.runs.saved_run import SavedRun
from dist_vsd.training.prompt import words_of
from dist_vsd.view_words import VIEW_WORDS


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was found of the particles of a prompt.

    Attributes:
        figures: by name; see metric_names.
        verdict: CLIP's, by particle and view; None without a CLIP.
        question: that CLIP was asked.
        by_particle: figures that each particle has of its own, in the order of the ids.
    """

    figures: dict[str, float]
    verdict: Verdict | None
    question: Question
    by_particle: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def predictions(self) -> dict[str, Any]:
        """Return what was recognised, as plain values: a row for each particle, an item for each view."""
        if self.verdict is None:
            return {}
        verdict, pairs = self.verdict, all_pairs()
        found: dict[str, Any] = {
            "similarity": [[round(cosine, 4) for cosine in row] for row in verdict.similarity.tolist()],
            "nearest": [[self.question.candidates[i] for i in row] for row in verdict.prediction.argmax(-1).tolist()],
            "view": [[VIEW_WORDS[i] for i in row] for row in verdict.view.tolist()],
        }
        if verdict.pair.numel():
            found["object"] = [[pairs[i][0] for i in row] for row in verdict.pair.tolist()]
            found["color"] = [[pairs[i][1] for i in row] for row in verdict.pair.tolist()]
        if verdict.num_faces.numel():
            found["num_faces"] = verdict.num_faces.tolist()
        return found


def figures_of_pictures(
    pictures: Tensor, prompt: str, instruments: Instruments, view_words: Sequence[str] = (), num_azimuths: int = 0
) -> Evaluation:
    """Judge pictures, of particles or of anything else, such as samples of the prior (P of them, V = 1).

    Args:
        pictures: (P, V, 3, H, W) in [0, 1], V views of each of P particles.
        prompt: what they should show.
        instruments: to judge by; those that need more than pictures (overlap, t3bench, samples, fid) stand aside.
        view_words: of each of the V views, if these have poses ...
        num_azimuths: ... and the number of azimuths of each turn; see Question.
    """
    question = ask(prompt, instruments.prompts, instruments.in_embedded_language, view_words, num_azimuths)
    figures: dict[str, float] = {}
    verdict = None
    if instruments.scorer is not None:
        judge = ClipJudge(instruments.scorer, question)
        verdict = judge(pictures)
        figures |= figures_of(ClipSums.of(verdict, judge.num_pairs), len(pictures), question)
    if len(pictures) > 1:
        if instruments.dino is not None and "dino" in instruments.metrics:
            figures["particles/diversity_dino"] = diversity(instruments.dino.embed(pictures).sum(0), len(pictures))
        if instruments.lpips is not None and "lpips" in instruments.metrics:
            figures["particles/lpips"] = instruments.lpips.mean_distance(pictures)
    return Evaluation(_asked_for(figures, instruments), verdict, question)


def evaluate_run(saved: SavedRun, instruments: Instruments) -> Evaluation:
    """Evaluate the particles of a run; metrics that have no meaning for it are left out.

    Args:
        saved: the run.
        instruments: to judge by.
    """
    config = saved.config
    wanted = [metric for metric in instruments.metrics if not instruments.missing(metric) and not instruments.unfit(metric, saved)]
    cameras = turns(config.camera, instruments.num_azimuths, instruments.elevations_deg)
    pictures = torch.stack(capture(saved, cameras))
    poses = ([], 0) if config.is_flat else (words_of(cameras, config.camera), instruments.num_azimuths)
    instruments = dataclasses.replace(instruments, metrics=tuple(wanted))
    found = figures_of_pictures(pictures, config.prompt, instruments, *poses)
    figures, by_particle = dict(found.figures), {}
    if {"overlap", "chamfer"} & set(wanted):
        by_particle |= figures_of_solids(saved, found.question, "chamfer" in wanted)
    if "t3bench" in wanted:
        by_particle["t3bench/quality"] = qualities(saved, instruments)
    if found.verdict is not None:
        by_particle["clip/score"] = found.verdict.similarity.mean(1).tolist()
        by_particle["clip/r_precision"] = found.verdict.is_hit.float().mean(1).tolist()
    figures |= {name: sum(values) / len(values) for name, values in by_particle.items() if name not in figures}
    if "texture" in wanted:
        shown = latents_of(saved) if config.representation_row.is_latent else pictures.flatten(0, 1)
        figures["particles/finest_octave"] = finest_octave(shown)
    if {"samples", "fid"} & set(wanted):
        figures |= figures_against_samples(saved, pictures, found, instruments)
    return dataclasses.replace(found, figures=_asked_for(figures, instruments), by_particle=by_particle)


@torch.no_grad()
def latents_of(saved: SavedRun) -> Tensor:
    """Return (P, C, h, w): x_0 of latent particles, as they are."""
    return torch.cat([theta.render(Cameras.none(1), 0).image for theta in saved.particles.values()])


def _asked_for(figures: dict[str, float], instruments: Instruments) -> dict[str, float]:
    """Return the figures of the metrics that are wanted, in the order of METRICS."""
    return {name: figures[name] for metric, names in METRICS.items() if metric in instruments.metrics for name in names if name in figures}


@torch.no_grad()
def figures_of_solids(saved: SavedRun, question: Question, has_surface: bool) -> dict[str, list[float]]:
    """Compare each particle with the known scene of the prompt's object: volumes, and surfaces where particles have one."""
    assert question.words is not None
    name, thetas = question.words.name, list(saved.particles.values())
    found = [best_overlap(theta, name) for theta in thetas]
    figures = {"overlap/iou": [one.iou for one in found]}
    if has_surface:
        bound = saved.config.field.bound
        distances = [surface_distance(*theta.surface(), name, one, bound) for theta, one in zip(thetas, found, strict=True)]
        figures["chamfer/distance"] = [one.chamfer for one in distances]
        figures["chamfer/normal_consistency"] = [one.normal_consistency for one in distances]
    return figures


def qualities(saved: SavedRun, instruments: Instruments) -> list[float]:
    """Return each particle's quality from all around, scored by CLIP; see sphere_quality."""
    assert instruments.scorer is not None
    judge = ClipJudge(instruments.scorer, Question(saved.config.prompt, (saved.config.prompt,)))
    around = sphere(saved.config.camera, instruments.sphere_subdivisions)
    num_viewpoints = len(around.neighbours)
    found = []
    for views in capture(saved, around.cameras):
        scores = judge(views[None]).similarity[0].view(num_viewpoints, -1)
        found.append(sphere_quality(scores, around.neighbours))
    return found


def figures_against_samples(saved: SavedRun, pictures: Tensor, found: Evaluation, instruments: Instruments) -> dict[str, float]:
    """Compare a run's pictures with samples of its prior, drawn with the view words of the pictures' cameras.

    samples/color_bits and view_bits: the entropy that as many samples as there are particles would show (expected_entropy_bits);
    samples/color_distance, view_distance: the total variation between what is recognised in the pictures and in the samples;
    samples/diversity, for pictures: 1 - the mean cosine of two samples, what particles/diversity would be of them; samples/fid_*:
    frechet_distance in the features of CLIP and of DINO; samples/finest_octave, nearest and nearest_of_themselves: see texture.py.
    """
    assert instruments.samples is not None
    config, question = saved.config, found.question
    samples = instruments.samples.of(config.prior, config.prompt, question.view_words, config.flow)
    is_latent = config.representation_row.is_latent
    figures: dict[str, float] = {"samples/finest_octave": finest_octave(samples.latents if is_latent else samples.pictures)}
    if found.verdict is not None and instruments.scorer is not None:
        judge = ClipJudge(instruments.scorer, dataclasses.replace(question, view_words=(), num_azimuths=0))
        verdict = judge(samples.pictures[:, None])
        ours, theirs = (ClipSums.of(of, judge.num_pairs) for of in (found.verdict, verdict))
        num_particles = len(pictures)
        if question.words and not question.words.color:
            figures["samples/color_bits"] = expected_entropy_bits(theirs.colors, num_particles)
            figures["samples/color_distance"] = total_variation(ours.colors, theirs.colors)
        if question.words and not question.words.view and not question.num_azimuths:
            figures["samples/view_bits"] = expected_entropy_bits(theirs.views, num_particles)
            figures["samples/view_distance"] = total_variation(ours.views, theirs.views)
        if not question.num_azimuths:
            figures["samples/diversity"] = diversity(theirs.embedding, len(samples.pictures))
        of_particles, of_samples = found.verdict.embedding.flatten(0, 1), verdict.embedding.flatten(0, 1)
        figures["samples/nearest"] = nearest_distance(of_particles, of_samples)
        figures["samples/nearest_of_themselves"] = nearest_distance_of_themselves(of_samples)
        if "fid" in instruments.metrics:
            figures["samples/fid_clip"] = frechet_distance(of_particles, of_samples)
    if instruments.dino is not None and "fid" in instruments.metrics:
        ours_dino, theirs_dino = instruments.dino.embed(pictures).flatten(0, 1), instruments.dino.embed(samples.pictures)
        figures["samples/fid_dino"] = frechet_distance(ours_dino, theirs_dino)
    return figures
