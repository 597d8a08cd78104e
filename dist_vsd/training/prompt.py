"""The run's prompt as the frozen model reads it: y^c with words for the view, y without."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dist_vsd.cameras import Cameras
from dist_vsd.config import CameraConfig, RunConfig
from dist_vsd.diffusion.guidance import FRONT_BEFORE_BACK, FRONT_BEFORE_SIDE, SIDE_BEFORE_BACK, SIDE_BEFORE_FRONT, decay
from dist_vsd.priors.prior import Prior, Text, TextEmbeddings
from dist_vsd.view_words import VIEW_WORDS, view_words

FRONT, SIDE, BACK, OVERHEAD = range(len(VIEW_WORDS))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The run's prompt, embedded once.

    Attributes:
        by_view: y^c, a row for each of VIEW_WORDS; None where the prompt does not depend on the view.
        plain: y, one row without view words; phi's text.
        perp_neg: whether neighbouring views are mixed and the wrong ones steered away from.
    """

    by_view: TextEmbeddings | None
    plain: TextEmbeddings
    perp_neg: bool = False

    def for_views(self, views: Tensor, azimuth_deg: Tensor) -> TextEmbeddings:
        """Return y^c for B views.

        Args:
            views: (B,) of views_of, on the prior's device.
            azimuth_deg: (B,) of their cameras.
        """
        if self.by_view is None:
            return self.plain.expand(len(views))
        if not self.perp_neg:
            return self.by_view[views]
        return mixed_views(self.by_view, azimuth_deg, views == OVERHEAD)


def embed_prompt(config: RunConfig, prior: Prior) -> Prompt:
    """Embed the prompt of a run.

    Raises:
        ValueError: the prior does not know its words, or it is too long.
    """
    rows = prior.embed(config.texts, config.negative_prompt)
    return Prompt(rows[1:] if len(rows.cond) > 1 else None, rows[:1], config.prompting.perp_neg)


def views_of(cameras: Cameras, config: CameraConfig) -> Tensor:
    """Return from where each camera looks, (B,) rows of VIEW_WORDS on the host; for cameras of the host."""
    return torch.tensor([VIEW_WORDS.index(words) for words in words_of(cameras, config)])


def words_of(cameras: Cameras, config: CameraConfig) -> list[str]:
    """Return the view words of each camera."""
    poses = zip(cameras.azimuth_deg.tolist(), cameras.elevation_deg.tolist(), strict=True)
    return [view_words(a, e, config.overhead_deg, config.front_deg) for a, e in poses]


def mixed_views(by_view: TextEmbeddings, azimuth_deg: Tensor, is_overhead: Tensor) -> TextEmbeddings:
    """Mix the texts of the two views beside each azimuth, and name the views that it is not (Perp-Neg; Armandpour et al. 2023).

    Between front and side, front and side are steered away from, the more the other one dominates; between side and back,
    side and front. From above nothing is.

    Args:
        by_view: a row for each of VIEW_WORDS.
        azimuth_deg: (B,).
        is_overhead: (B,) bool.

    Returns:
        B rows with two negatives.
    """
    assert by_view.uncond is not None
    count, quarter = len(azimuth_deg), torch.remainder(azimuth_deg + 180.0, 360.0).sub(180.0).abs() / 90.0
    rows = [by_view.cond[view : view + 1].expand(count) for view in range(len(VIEW_WORDS))]
    before = quarter < 1.0  # between front and side
    share = torch.where(before, 1.0 - quarter, 2.0 - quarter)  # of the front, or of the side
    cond = choose(before, rows[SIDE].lerp(rows[FRONT], share), rows[BACK].lerp(rows[SIDE], share))
    cond = choose(is_overhead, rows[OVERHEAD], cond)
    front = torch.where(before, decay(FRONT_BEFORE_SIDE, share), decay(FRONT_BEFORE_BACK, share))
    side = torch.where(before, decay(SIDE_BEFORE_FRONT, 1.0 - share), decay(SIDE_BEFORE_BACK, share))
    weights = torch.stack([front, side]).clamp(max=0.0) * ~is_overhead
    return TextEmbeddings(cond, by_view.uncond[:1].expand(count), (rows[FRONT], rows[SIDE]), weights)


def choose(where: Tensor, one: Text, other: Text) -> Text:
    """Return the rows of one text where a (B,) flag holds, and of another where it does not."""
    return other.lerp(one, where.to(one.tokens.dtype))
