"""Looking at the particles while they are optimised: grids in renders/, figures by CLIP, turntables for a reporter that takes them.

Every particle is rendered from the same cameras, without randomness, so a look changes nothing of the run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vsd.cameras import turntable
from dist_vsd.evaluation.clip_figures import ClipSums, clip_score, diversity, r_precision
from dist_vsd.export.turntable import render_views
from dist_vsd.image_files import enlarge, tile, write_mp4, write_png
from dist_vsd.priors.clip import ClipScorer
from dist_vsd.priors.embedded.captions import all_pairs, caption
from dist_vsd.priors.pipeline_folder import EMBEDDED_NAME
from dist_vsd.training.metrics import Reporter
from dist_vsd.training.run_directory import RunDirectory
from dist_vsd.training.state import TrainingState

NUM_VIEWS, ELEVATION_DEG = 6, 15.0
FRAMES_A_VIEW, FRAMES_PER_SECOND = 4, 12.0  # of a turntable: its every fourth frame is a view of the grid
MOST_IN_A_VIDEO = 8


class Look:
    """Looks at all particles after an update, if it is time to.

    Args:
        state: of the run.
        directory: of the run.
        reporter: takes figures and media.
        takes_media: whether the reporter of rank 0 takes them; the same on all ranks.
    """

    def __init__(self, state: TrainingState, directory: RunDirectory, reporter: Reporter, takes_media: bool) -> None:
        self._state, self._directory, self._reporter = state, directory, reporter
        self._with_turntable = takes_media and state.config.representation == "radiance_field"
        self._takes_media = takes_media
        self._clip: Judge | None = None

    def __call__(self, done: int) -> None:
        """Look after ``done`` updates: a grid every preview_every, all the rest every media_every, both at the end (collective)."""
        config, layout = self._state.config, self._state.layout
        is_last = done == config.num_updates
        is_shown = done % config.media_every == 0 or is_last
        if not (is_shown or done % config.preview_every == 0):
            return
        turn = is_shown and self._with_turntable
        frames = render_particles(self._state, NUM_VIEWS * (FRAMES_A_VIEW if turn else 1)) if layout.view_rank == 0 else []
        views = [row[:: FRAMES_A_VIEW if turn else 1] for row in frames]
        if views:
            write_png(enlarge(tile(views), 2), self._directory.path / file_of(self._state, layout.shard, done, "png"))
        if not is_shown:
            return
        figures = self._figures(views)
        if figures:
            self._reporter.log(done, figures)
        if frames and turn:
            write_mp4(side_by_side(frames), self._directory.path / file_of(self._state, layout.shard, done, "mp4"), FRAMES_PER_SECOND)
        if self._takes_media:
            self._state.collectives.barrier()  # the other shards' files
            kinds = {"media/grid": "png"} | ({"media/turntable": "mp4"} if turn else {})
            shards = range(layout.num_shards)
            files = {name: [file_of(self._state, shard, done, kind) for shard in shards] for name, kind in kinds.items()}
            self._reporter.show(done, files)

    def _figures(self, views: list[Tensor]) -> dict[str, float]:
        """Return the figures by CLIP over all particles (collective); empty without a CLIP beside the prior."""
        folder = self._state.prior.folder
        if folder is None or not (folder.path / "clip").is_dir():
            return {}
        if self._clip is None:
            self._clip = Judge(self._state)
        return self._clip.figures(views)


class Judge:
    """Compares views with the prompt by the CLIP that lies beside the prior.

    R-precision is told where the prior is the embedded one and the prompt one of its captions: these are what it is told from.

    Args:
        state: of the run.
    """

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self._scorer = ClipScorer.load(state.prior.folder.path / "clip", state.prior.device)
        prompt = state.config.prompt
        captions = [caption(*pair) for pair in all_pairs()] if state.config.prior == EMBEDDED_NAME else []
        self._has_distractors = prompt in captions
        texts = captions if self._has_distractors else [prompt]
        self._right = texts.index(prompt)
        self._texts = self._scorer.embed_texts(texts)

    @torch.no_grad()
    def figures(self, views: list[Tensor]) -> dict[str, float]:
        """Return clip/score, clip/r_precision and particles/diversity over all ranks (collective).

        Args:
            views: (V, 3, H, W) in [0, 1] of each particle that this rank speaks for; the others speak for none.
        """
        device = self._state.prior.device
        sums = ClipSums.zeros(NUM_VIEWS, self._texts.shape[1], device)
        if views:
            embeddings = torch.stack([self._scorer.embed_images(row.to(device)) for row in views])
            sums = ClipSums.of(embeddings, self._texts, self._right)
        self._state.collectives.sum_over_ranks([sums.similarity, sums.hits, sums.embedding])
        num_particles = self._state.layout.num_particles
        figures = {"clip/score": clip_score(sums, num_particles)}
        if self._has_distractors:
            figures["clip/r_precision"] = r_precision(sums, num_particles)
        if num_particles > 1:
            figures["particles/diversity"] = diversity(sums, num_particles)
        return figures


def render_particles(state: TrainingState, num_frames: int) -> list[Tensor]:
    """Render one turn of each particle of this rank's shard; each (num_frames, 3, H, W) in [0, 1], on the CPU."""
    camera = state.config.camera
    distance, fov_deg = sum(camera.distance) / 2, sum(camera.fov_deg) / 2
    cameras = turntable(num_frames, ELEVATION_DEG, distance, fov_deg).to(state.prior.device)
    rows = []
    for particle in state.particles:
        state.residence.fetch([particle])
        rows.append(render_views(particle.theta, cameras, state.config.render_size))
        state.residence.release([particle])
    state.residence.settle()
    return rows


def side_by_side(rows: list[Tensor]) -> Tensor:
    """Lay the frames of several particles beside one another; (num_frames, 3, H, W)."""
    return torch.cat([enlarge(row, 2) for row in rows[:MOST_IN_A_VIDEO]], -1)


def file_of(state: TrainingState, shard: int, done: int, extension: str) -> str:
    """Return the name, within the run directory, of a shard's picture or video after ``done`` updates."""
    ids = state.layout.particles_of_shard(shard)
    return f"renders/update_{done:08d}_particles_{ids[0]:04d}-{ids[-1]:04d}.{extension}"
