"""Which face is on the other side of each edge of a mesh."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_FOUND = WeakIdKeyDictionary()  # of tensors of faces that are still there: a mesh keeps its faces for many pictures


def faces_across(faces: Tensor) -> tuple[Tensor, Tensor]:
    """Return the face across each edge; edge i of a face is opposite its vertex i.

    Edges are the same where their vertices are: those of vertices that merely have the same place are borders. Of three or more faces at
    an edge each has the next as its other one, and the last has the first. A face that names a vertex twice has no neighbours.

    Args:
        faces: (F, 3) int64.

    Returns:
        (F, 3) int64, -1 at a border; (F, 3) booleans: whether the two go around in opposite senses, as of one surface's two sides.
    """
    version = 0 if faces.is_inference() else faces._version
    if _FOUND.get(faces, (None,))[0] != version:
        _FOUND[faces] = (version, _faces_across(faces))
    return _FOUND[faces][1]


@torch.no_grad()
def _faces_across(faces: Tensor) -> tuple[Tensor, Tensor]:
    one, other = faces.roll(-1, 1), faces.roll(1, 1)
    places = torch.arange(faces.numel(), device=faces.device)
    is_twice = (one == other).any(1, keepdim=True).expand(-1, 3)
    keys = torch.where(is_twice, -1 - places.view(-1, 3), (torch.minimum(one, other) << 32) | torch.maximum(one, other))
    keys, order = keys.flatten().sort(stable=True)
    is_first = torch.ones_like(keys, dtype=torch.bool)
    is_first[1:] = keys[1:] != keys[:-1]
    first = torch.where(is_first, places, 0).cummax(0).values
    following = torch.where(is_first.roll(-1), first, places + 1)
    edge = torch.empty_like(order).scatter_(0, order, order[following])  # of each edge the other one
    is_forward = (one < other).flatten()
    is_turned = (is_forward == is_forward[edge]).view(-1, 3)
    return torch.where(edge == places, -1, edge // 3).view(-1, 3), is_turned
