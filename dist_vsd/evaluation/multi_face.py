"""The multi-face ("Janus") fault: the front's features seen from more than one side.

For each azimuth of a turn, which of "<prompt>, front view", "... side view" and "... back view" fits best by CLIP? The arcs of azimuth in
which the front wins are counted. An object with one face has one arc, a quarter of the turn wide as view words go.

What this can't see: anything of objects without a front (a ball, a cone); a second face beside the first, whose arc then only grows wider
(two faces a quarter of a turn apart are one arc of 180 degrees, and count as one); a part that is there twice (two beaks, six legs)
without looking like a front; and any of it if the CLIP does not know view words.

The embedded CLIP, on turns of 24 rendered views of the six objects with a front, in random colours and proportions (36 turns; cosines
averaged over 15 degrees on either side): two faces are found on 3 % of the scenes as they are, and on 92 % of those whose front half's
pictures are shown from behind too, which is how particles go wrong that score distillation pulls to the front from all sides. Where the
scene itself is mirrored and stays in its light, only on 44 %: that CLIP tells front from back by the light as well (it is from the front).
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDEST_FACE_DEG = 180.0


def smooth_around(cosines: Tensor, half_width: int) -> Tensor:
    """Average (A, C) values over the 2 half_width + 1 neighbouring azimuths of a turn, so that one odd view makes no face."""
    shifts = range(-half_width, half_width + 1)
    return torch.stack([cosines.roll(shift, 0) for shift in shifts]).mean(0)


def arcs(is_front: Tensor) -> list[int]:
    """Return the lengths of the runs of True around a circle of (A,) flags; one of length A if all are."""
    flags = is_front.tolist()
    if all(flags):
        return [len(flags)]
    begin = flags.index(False)
    lengths, current = [], 0
    for flag in [*flags[begin:], *flags[: begin + 1]]:
        if flag:
            current += 1
        elif current:
            lengths.append(current)
            current = 0
    return lengths


def count_faces(is_front: Tensor) -> int:
    """Count the faces of an object from where its front is seen.

    Each arc is a face; one that is wider than WIDEST_FACE_DEG can't be a single one and counts twice.

    Args:
        is_front: (A,) whether the front wins, at azimuths evenly spaced over the whole turn.
    """
    widest = WIDEST_FACE_DEG / 360.0 * len(is_front)
    return sum(2 if length > widest else 1 for length in arcs(is_front))


def num_faces(view_cosines: Tensor, num_azimuths: int, half_width: int) -> Tensor:
    """Count the faces of particles.

    Args:
        view_cosines: (P, E * A, 3) cosines with the texts of front, side and back; azimuths turn fastest, and E elevations are averaged.
        num_azimuths: A.
        half_width: azimuths on either side over which cosines are averaged.

    Returns:
        (P,) int64.
    """
    turns = view_cosines.unflatten(1, (-1, num_azimuths)).mean(1)
    fronts = [smooth_around(turn, half_width).argmax(-1) == 0 for turn in turns]
    return torch.tensor([count_faces(front) for front in fronts], dtype=torch.int64)
