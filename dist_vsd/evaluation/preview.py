"""Previews of the particles while they are optimised: grids in renders/, figures by CLIP, turntables for a reporter that takes them.

Every particle is rendered from the same cameras, without randomness, so a preview changes nothing of the run.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.evaluation.clip_figures import ClipSums, figures_of, sums_of
from dist_vsd.evaluation.instruments import NO_CLIP
from dist_vsd.evaluation.judge import ClipJudge
from dist_vsd.evaluation.question import ask
from dist_vsd.evaluation.views import turns
from dist_vsd.export.turntable import render_views
from dist_vsd.image_files import enlarge, tile, write_mp4, write_png
from dist_vsd.priors.clip import ClipScorer
from dist_vsd.priors.clip_folder import clip_for
from dist_vsd.priors.pipeline_folder import EMBEDDED_FOLDERS
from dist_vsd.reporting.reporter import Reporter
from dist_vsd.runs.run_directory import RunDirectory
from dist_vsd.training.prompt import words_of
from dist_vsd.training.state import TrainingState

# Views of a turn: of a turntable, of which the figures take every second and the grid every fourth.
NUM_FRAMES, NUM_JUDGED, NUM_SHOWN, ELEVATION_DEG = 24, 12, 6, 15.0
FRAMES_PER_SECOND = 12.0
MOST_IN_A_VIDEO = 8
PICTURES_IN_A_ROW = 8


class Preview:
    """Shows all particles after an update, if it is time to.

    Args:
        state: of the run.
        directory: of the run.
        reporter: takes figures and media.
        takes_media: whether the reporter of rank 0 takes them; the same on all ranks.
    """

    def __init__(self, state: TrainingState, directory: RunDirectory, reporter: Reporter, takes_media: bool) -> None:
        self._state, self._directory, self._reporter = state, directory, reporter
        self._is_flat, self._takes_media = state.config.is_flat, takes_media
        self._clip = clip_for(state.config.prior, state.config.evaluate_clip)
        self._panel: Panel | None = None
        self._has_told = False

    def __call__(self, done: int) -> None:
        """Preview after ``done`` updates, every ``preview_every`` of them and at the end of a stage (collective)."""
        config, layout = self._state.config, self._state.layout
        if done % config.preview_every and done != self._state.stage.last:
            return
        has_turntable = self._takes_media and not self._is_flat
        num_frames = 1 if self._is_flat else NUM_FRAMES if has_turntable else NUM_JUDGED if self._clip else NUM_SHOWN
        frames = render_particles(self._state, num_frames) if layout.view_rank == 0 else []
        if frames:
            write_png(enlarge(self._grid(frames), 2), self._directory.path / file_of(self._state, layout.shard, done, "png"))
        if frames and has_turntable:
            write_mp4(side_by_side(frames), self._directory.path / file_of(self._state, layout.shard, done, "mp4"), FRAMES_PER_SECOND)
        self._judge([row[:: max(1, num_frames // NUM_JUDGED)] for row in frames], done)
        if self._takes_media:
            self._state.collectives.barrier()  # the other shards' files
            kinds = {"media/grid": "png"} | ({"media/turntable": "mp4"} if has_turntable else {})
            shards = range(layout.num_shards)
            files = {name: [file_of(self._state, shard, done, kind) for shard in shards] for name, kind in kinds.items()}
            self._reporter.show(done, files)

    def _grid(self, frames: list[Tensor]) -> Tensor:
        """Lay out one picture: a row for each particle, or all of them side by side if they have but one view."""
        if not self._is_flat:
            return tile([row[:: len(row) // NUM_SHOWN] for row in frames])
        pictures = torch.cat(frames)
        columns = min(PICTURES_IN_A_ROW, len(pictures))
        white = pictures.new_ones(-len(pictures) % columns, *pictures.shape[1:])
        return tile(list(torch.cat([pictures, white]).split(columns)))

    def _judge(self, views: list[Tensor], done: int) -> None:
        """Report the figures by CLIP over all particles, where there is one; say once where there is none (collective)."""
        if self._clip is None:
            if not self._has_told:
                self._reporter.event(done, f"no figures by CLIP (score, R-precision, diversity, faces): {NO_CLIP}")
            self._has_told = True
            return
        if self._panel is None:
            self._panel = Panel(self._state, self._clip)
        self._reporter.log(done, self._panel.figures(views))


class Panel:
    """Judges views by a CLIP; see clip_figures.

    R-precision is told where the prior is the embedded one and the prompt one of its captions: these are what it is told from.

    Args:
        state: of the run.
        clip: folder of the CLIP.
    """

    def __init__(self, state: TrainingState, clip: Path) -> None:
        self._state = state
        config = state.config
        poses = ([], 0) if config.is_flat else (words_of(preview_cameras(state, NUM_JUDGED), config.camera), NUM_JUDGED)
        self._question = ask(config.prompt, (), config.prior in EMBEDDED_FOLDERS, *poses)
        self._judge = ClipJudge(ClipScorer.load(clip, state.prior.device), self._question)

    def figures(self, views: list[Tensor]) -> dict[str, float]:
        """Return the figures over all ranks (collective).

        Args:
            views: (V, 3, H, W) in [0, 1] of each particle that this rank speaks for; the others speak for none.
        """
        judge, num_views = self._judge, max(1, self._question.num_azimuths)
        if views:
            sums = sums_of(judge, torch.stack(views))
        else:
            sums = ClipSums.zeros(num_views, judge.width, len(self._question.candidates), judge.num_pairs, self._state.prior.device)
        tensors = [tensor.contiguous() for tensor in sums.tensors]
        self._state.collectives.sum_over_ranks(tensors)
        return figures_of(ClipSums(*tensors), self._state.layout.num_particles, self._question)


def preview_cameras(state: TrainingState, num_frames: int) -> Cameras:
    """Return the cameras of a preview: one turn."""
    return turns(state.config.camera, num_frames, (ELEVATION_DEG,))


def render_particles(state: TrainingState, num_frames: int) -> list[Tensor]:
    """Render one turn of each particle of this rank's shard; each (num_frames, 3, H, W) in [0, 1], on the CPU."""
    cameras = preview_cameras(state, num_frames).to(state.prior.device)
    rows = []
    for particle in state.particles:
        state.placement.fetch([particle])
        rows.append(render_views(particle.theta, cameras, state.config.render_size, state.prior.decode))
        state.placement.release([particle])
    state.placement.settle()
    return rows


def side_by_side(rows: list[Tensor]) -> Tensor:
    """Lay the frames of several particles beside one another; (num_frames, 3, H, W)."""
    return torch.cat([enlarge(row, 2) for row in rows[:MOST_IN_A_VIDEO]], -1)


def file_of(state: TrainingState, shard: int, done: int, extension: str) -> str:
    """Return the name, within the run directory, of a shard's picture or video after ``done`` updates."""
    ids = state.layout.particles_of_shard(shard)
    return f"renders/update_{done:08d}_particles_{ids[0]:04d}-{ids[-1]:04d}.{extension}"
