"""Marching tetrahedra on the part of a cubic lattice that a surface is near (Doi and Koide 1991; as a parameterisation DMTet, 2021).

A cube of R^3 cells has (R + 1)^3 vertices, numbered (i (R + 1) + j) (R + 1) + k. Each cell is cut into Kuhn's six tetrahedra along its
diagonal from (0, 0, 0) to (1, 1, 1): neighbours agree on how their common face is cut, so the surface has no cracks.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

CORNERS = tuple(itertools.product((0, 1), repeat=3))  # of a cell; corner number 4 i + 2 j + k
DIRECTIONS = CORNERS[1:]  # of the edges, from their lower end
# Between the ends of an edge, cells: where both are all but on the surface, a step would throw its vertex from end to end.
LEAST_DISTANCE = 0.02
EDGES = tuple(itertools.combinations(range(4), 2))  # of a tetrahedron


def _kuhn() -> tuple[tuple[int, ...], ...]:
    """Return the corners of a cell's six tetrahedra, each so that the last three turn right-handed as seen from the first."""
    found = []
    for order in itertools.permutations((4, 2, 1)):
        corners = [0, order[0], order[0] + order[1], 7]
        points = torch.tensor([CORNERS[corner] for corner in corners], dtype=torch.float64)
        if torch.linalg.det(points[1:] - points[0]) < 0:
            corners[1], corners[2] = corners[2], corners[1]
        found.append(tuple(corners))
    return tuple(found)


def _triangles() -> list[list[list[int]]]:
    """Return for each code (bit n: vertex n is inside) two triangles as numbers of EDGES, facing outwards; -1 where there is none."""
    corners = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)  # right-handed as those of _kuhn()
    number = {frozenset(edge): index for index, edge in enumerate(EDGES)}
    table = []
    for code in range(16):
        inside = [n for n in range(4) if code >> n & 1]
        outside = [n for n in range(4) if not code >> n & 1]
        ring = []  # around the cut, neighbours share a vertex
        if len(inside) == 2:
            (a, b), (c, d) = inside, outside
            ring = [(a, c), (a, d), (b, d), (b, c)]
        elif len(inside) in (1, 3):
            ring = [(a, b) for a in inside for b in outside]
        if ring:
            points = torch.stack([(corners[a] + corners[b]) / 2 for a, b in ring])
            normal = torch.linalg.cross(points[1] - points[0], points[2] - points[0])
            if normal @ (corners[outside].mean(0) - corners[inside].mean(0)) < 0:
                ring.reverse()
        numbers = [number[frozenset(edge)] for edge in ring]
        fans = [[numbers[0], *numbers[n : n + 2]] for n in range(1, len(numbers) - 1)]
        table.append((fans + [[-1, -1, -1]] * 2)[:2])
    return table


KUHN, TRIANGLES = _kuhn(), _triangles()


@dataclasses.dataclass(frozen=True)
class Tetrahedra:
    """The tetrahedra among N vertices of the lattice.

    Attributes:
        edges: (E, 2) rows of their ends.
        corners: (T, 4) rows of each tetrahedron's vertices.
        edges_of: (T, 6) each tetrahedron's edges, in the order of EDGES.
        is_border: (N,) whether a cell at the vertex is missing: there the surface must not go, or it would be open.
        triangles: (16, 2, 3) TRIANGLES, on the device.
        bits: (4,) 1, 2, 4, 8, of which codes are made.
    """

    edges: Tensor
    corners: Tensor
    edges_of: Tensor
    is_border: Tensor
    triangles: Tensor
    bits: Tensor


def lattice_coordinates(vertices: Tensor, resolution: int) -> Tensor:
    """Return the (N, 3) integer coordinates of (N,) vertices."""
    side = resolution + 1
    return torch.stack([vertices // side**2, vertices // side % side, vertices % side], -1)


def find(sorted_values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return where values stand in (N,) ascending ones, and whether they are there at all (where not, the row means nothing)."""
    rows = torch.searchsorted(sorted_values, wanted).clamp_(max=len(sorted_values) - 1)
    return rows, sorted_values[rows] == wanted


def tetrahedra_among(vertices: Tensor, resolution: int) -> Tetrahedra:
    """Return the tetrahedra of all cells of which every corner is among (N,) vertices, which ascend.

    Their number is known by the device alone, which is waited for; it is asked once for many renders.
    """
    side, device = resolution + 1, vertices.device
    offsets = torch.tensor([(i * side + j) * side + k for i, j, k in CORNERS], device=device)
    begins = vertices[(lattice_coordinates(vertices, resolution) < resolution).all(-1)]
    rows, is_there = find(vertices, begins[:, None] + offsets)  # (n, 8)
    rows = rows[is_there.all(-1)]
    incident = torch.bincount(rows.reshape(-1), minlength=len(vertices))
    corners = rows[:, torch.tensor(KUHN, device=device)].reshape(-1, 4)
    ends = corners[:, torch.tensor(EDGES, device=device)].sort(-1).values  # (T, 6, 2)
    # An edge by its lower end and its direction: rows ascend as vertices do, so the lower end is the first.
    number = torch.zeros(int(offsets[-1]) + 1, dtype=torch.int64, device=device)
    number[offsets] = torch.arange(len(CORNERS), device=device)
    direction = number[vertices[ends[..., 1]] - vertices[ends[..., 0]]]
    keys, edges_of = torch.unique(ends[..., 0] * len(CORNERS) + direction, return_inverse=True)
    low = keys // len(CORNERS)
    high, _ = find(vertices, vertices[low] + offsets[keys % len(CORNERS)])
    constants = torch.tensor(TRIANGLES, device=device), 2 ** torch.arange(4, device=device)
    return Tetrahedra(torch.stack([low, high], -1), corners, edges_of, incident < len(CORNERS), *constants)


def march(positions: Tensor, distance: Tensor, tetrahedra: Tetrahedra) -> tuple[Tensor, Tensor]:
    """Return the surface at distance zero, a vertex on each edge that crosses it; differentiable in positions and distances.

    Args:
        positions: (N, 3) of the vertices.
        distance: (N,), in cells, negative inside; linear along an edge.
        tetrahedra: among them.

    Returns:
        vertices (V, 3), and faces (F, 3), counter-clockwise as seen from outside. V and F are known by the device alone: it is waited for.
    """
    is_inside = distance.detach() < 0
    low, high = tetrahedra.edges.unbind(-1)
    crosses = is_inside[low] != is_inside[high]
    numbers = crosses.cumsum(0) - 1
    low, high = low[crosses], high[crosses]
    from_low, from_high = distance[low].abs(), distance[high].abs()
    share = (from_low / (from_low + from_high).clamp_min(LEAST_DISTANCE))[:, None]
    vertices = positions[low] + share * (positions[high] - positions[low])
    code = (is_inside[tetrahedra.corners] * tetrahedra.bits).sum(-1)
    is_cut = (code > 0) & (code < 15)
    chosen = tetrahedra.triangles[code[is_cut]].reshape(-1, 6)
    edges = tetrahedra.edges_of[is_cut].gather(1, chosen.clamp_min(0))
    faces = numbers[edges].reshape(-1, 3)[(chosen[:, ::3] >= 0).reshape(-1)]
    return vertices, faces


def near(solid: Tensor, width: int) -> Tensor:
    """Return which vertices of the lattice belong to a cell that the surface cuts, or are up to ``width`` cells from one.

    Args:
        solid: (S, S, S) bool, which vertices are inside.
        width: cells.
    """
    is_cut = _greatest(solid, 2) & _greatest(~solid, 2)  # (R, R, R): a corner inside and one outside
    corners = _greatest(torch.nn.functional.pad(is_cut, (1,) * 6), 2)  # (S, S, S)
    return _greatest(torch.nn.functional.pad(corners, (width,) * 6), 2 * width + 1) if width else corners


def _greatest(flags: Tensor, size: int) -> Tensor:
    """Return whether any flag is set in each cube of ``size`` flags a side; one axis after the other, shorter by size - 1 each."""
    for axis in range(3):
        parts = flags.unfold(axis, size, 1)
        flags = parts.any(-1)
    return flags
