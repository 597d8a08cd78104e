"""The procedural world that the embedded prior is trained on: twelve objects in eight colours as signed distance fields.

An object is a function from points and proportions to the distances of its parts; each part has a material. All are
mirror-symmetric in y and face +x (cameras.py's conventions), fit into a sphere of radius ``SCENE_RADIUS``, and vary in
their proportions by ``NUM_PROPORTIONS`` numbers in [-1, 1] (zero is the canonical object). Primitives follow the usual
closed forms of the signed distance literature (I. Quilez, "distance functions").
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

SCENE_RADIUS = 1.1
NUM_PROPORTIONS = 6

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.10, 0.08),
    "orange": (0.97, 0.50, 0.06),
    "yellow": (0.97, 0.86, 0.12),
    "green": (0.12, 0.62, 0.18),
    "blue": (0.12, 0.25, 0.85),
    "purple": (0.56, 0.17, 0.72),
    "black": (0.09, 0.09, 0.10),
    "white": (0.86, 0.86, 0.88),
}
# Materials of a part: the scene's own colour, or one of these.
MAIN = "main"
ACCENTS: dict[str, tuple[float, float, float]] = {
    "beak": (0.98, 0.55, 0.05),
    "dark": (0.08, 0.08, 0.09),
    "wood": (0.42, 0.26, 0.13),
    "cream": (0.90, 0.83, 0.70),
    "glass": (0.62, 0.80, 0.92),
    "lamp": (1.00, 0.95, 0.60),
    "dough": (0.80, 0.60, 0.36),
}


def _sphere(p: Tensor, center: tuple, radius) -> Tensor:
    return (p - p.new_tensor(center)).norm(dim=-1) - radius


def _ellipsoid(p: Tensor, center: tuple, radii: Tensor) -> Tensor:
    q = p - p.new_tensor(center)
    k0 = (q / radii).norm(dim=-1)
    k1 = (q / radii.square()).norm(dim=-1).clamp_min(1e-6)
    return k0 * (k0 - 1.0) / k1


def _box(p: Tensor, center: Tensor, half: Tensor, rounding: float = 0.03) -> Tensor:
    q = (p - center).abs() - half + rounding
    return q.clamp_min(0.0).norm(dim=-1) + q.amax(-1).clamp_max(0.0) - rounding


def _cylinder(p: Tensor, center: Tensor, radius, half_height, axis: int = 2, rounding: float = 0.02) -> Tensor:
    q = p - center
    radial = torch.cat([q[..., :axis], q[..., axis + 1 :]], -1).norm(dim=-1) - radius + rounding
    axial = q[..., axis].abs() - half_height + rounding
    outside = torch.stack([radial, axial], -1).clamp_min(0.0).norm(dim=-1)
    return outside + torch.maximum(radial, axial).clamp_max(0.0) - rounding


def _cone(p: Tensor, base_z, tip_z, radius) -> Tensor:
    """An upright cone; exact up to rounding at tip and rim (a lower bound of the distance there)."""
    height = tip_z - base_z
    slope = (height.square() + radius**2).sqrt() if isinstance(radius, float) else (height.square() + radius.square()).sqrt()
    radial = p[..., :2].norm(dim=-1)
    side = (radial * height + (p[..., 2] - tip_z) * radius) / slope
    return torch.maximum(side, base_z - p[..., 2])


def _torus(p: Tensor, major, minor, axis: int = 2) -> Tensor:
    plane = torch.cat([p[..., :axis], p[..., axis + 1 :]], -1).norm(dim=-1) - major
    return torch.stack([plane, p[..., axis]], -1).norm(dim=-1) - minor


def _vec(*components) -> Tensor:
    reference = next(c for c in components if isinstance(c, Tensor))
    return torch.stack([c if isinstance(c, Tensor) else torch.full_like(reference, c) for c in components], -1)


def _mirror(p: Tensor) -> Tensor:
    return torch.cat([p[..., :1], p[..., 1:2].abs(), p[..., 2:]], -1)


Part = tuple[Tensor, str]


def _ball(p: Tensor, u: Tensor) -> list[Part]:
    return [(_sphere(p, (0, 0, 0), 0.68 * (1 + 0.15 * u[..., 0])), MAIN)]


def _cube(p: Tensor, u: Tensor) -> list[Part]:
    half = 0.52 * (1 + 0.12 * u[..., 0])
    return [(_box(p, torch.zeros_like(p), _vec(half, half, half * (1 + 0.15 * u[..., 1])), 0.04), MAIN)]


def _cone_object(p: Tensor, u: Tensor) -> list[Part]:
    tip = 0.75 * (1 + 0.15 * u[..., 0])
    return [(_cone(p, torch.full_like(tip, -0.6), tip, 0.58 * (1 + 0.15 * u[..., 1])), MAIN)]


def _donut(p: Tensor, u: Tensor) -> list[Part]:
    major, minor = 0.55 * (1 + 0.08 * u[..., 0]), 0.26 * (1 + 0.15 * u[..., 1])
    whole = _torus(p, major, minor)
    icing = torch.maximum(_torus(p - p.new_tensor([0, 0, 0.03]), major, minor * 1.02), -0.05 - p[..., 2])
    return [(icing, MAIN), (whole, "dough")]


def _mug(p: Tensor, u: Tensor) -> list[Part]:
    radius, half_height = 0.44 * (1 + 0.12 * u[..., 0]), 0.56 * (1 + 0.12 * u[..., 1])
    q = p - p.new_tensor([0.12, 0, 0])
    outer = _cylinder(q, torch.zeros_like(p), radius, half_height)
    hollow = _cylinder(q, _vec(torch.zeros_like(radius), 0.0, half_height * 0.45 + 0.02), radius - 0.12, half_height * 0.62)
    # The handle is behind (-x), so that the front shows none of it.
    ring = _torus(q - _vec(-radius - 0.02, 0.0, 0.0), 0.26 * (1 + 0.2 * u[..., 2]), 0.085 * (1 + 0.2 * u[..., 3]), axis=1)
    handle = torch.maximum(ring, -(_cylinder(q, torch.zeros_like(p), radius - 0.06, half_height)))
    return [(torch.maximum(outer, -hollow), MAIN), (handle, MAIN)]


def _duck(p: Tensor, u: Tensor) -> list[Part]:
    body_length, head = 0.60 * (1 + 0.12 * u[..., 0]), 0.29 * (1 + 0.18 * u[..., 1])
    neck = 0.34 + 0.10 * u[..., 2]
    body = _ellipsoid(p, (-0.12, 0, -0.28), _vec(body_length, 0.44 * (1 + 0.1 * u[..., 3]), 0.42))
    tail = _ellipsoid(p, (-0.66, 0, -0.06), _vec(0.2 * (1 + 0.0 * neck), 0.16, 0.13))
    center = _vec(0.30, torch.zeros_like(neck), neck)
    q = p - center
    throat = _cylinder(p, _vec(0.26, torch.zeros_like(neck), neck / 2 - 0.02), 0.20, neck / 2 + 0.06)
    beak_length = 0.24 * (1 + 0.25 * u[..., 4])
    beak = _ellipsoid(q - _vec(head + 0.06, 0.0, -0.05), (0, 0, 0), _vec(beak_length, 0.15, 0.085))
    m = _mirror(q)
    eyes = (m - _vec(head * 0.72, head * 0.52, head * 0.42)).norm(dim=-1) - 0.075
    return [(body, MAIN), (tail, MAIN), (q.norm(dim=-1) - head, MAIN), (throat, MAIN), (beak, "beak"), (eyes, "dark")]


def _snowman(p: Tensor, u: Tensor) -> list[Part]:
    r1, r2, r3 = 0.40 * (1 + 0.1 * u[..., 0]), 0.30 * (1 + 0.1 * u[..., 1]), 0.23 * (1 + 0.12 * u[..., 2])
    z1 = r1 - 0.92
    z2 = z1 + r1 * 0.75 + r2 * 0.75
    z3 = z2 + r2 * 0.75 + r3 * 0.8
    zero = torch.zeros_like(r1)
    balls = [(p - _vec(zero, 0.0, z)).norm(dim=-1) - r for z, r in ((z1, r1), (z2, r2), (z3, r3))]
    q = p - _vec(zero, 0.0, z3)
    carrot = _ellipsoid(q - _vec(r3 + 0.08, 0.0, -0.01), (0, 0, 0), _vec(0.22 * (1 + 0.25 * u[..., 3]), 0.07, 0.07))
    eyes = (_mirror(q) - _vec(r3 * 0.82, r3 * 0.42, r3 * 0.38)).norm(dim=-1) - 0.055
    buttons = torch.minimum(
        (p - _vec(r2 * 0.97, 0.0, z2 + 0.1)).norm(dim=-1), (p - _vec(r2 * 0.97, 0.0, z2 - 0.08)).norm(dim=-1)
    ) - 0.06
    hat_height = 0.13 * (1 + 0.25 * u[..., 4])
    brim = _cylinder(q, _vec(zero, 0.0, r3 * 0.78), r3 * 1.05 * (1 + 0.12 * u[..., 5]), 0.04)
    crown = _cylinder(q, _vec(zero, 0.0, r3 * 0.78 + hat_height), r3 * 0.72, hat_height)
    return [*((b, MAIN) for b in balls), (carrot, "beak"), (eyes, "dark"), (buttons, "dark"), (brim, "wood"), (crown, "wood")]


def _car(p: Tensor, u: Tensor) -> list[Part]:
    length, width = 0.80 * (1 + 0.08 * u[..., 0]), 0.40 * (1 + 0.1 * u[..., 1])
    cabin_height, wheel = 0.20 * (1 + 0.2 * u[..., 2]), 0.19 * (1 + 0.15 * u[..., 3])
    zero = torch.zeros_like(length)
    body = _box(p, _vec(zero, 0.0, -0.10), _vec(length, width, 0.19), 0.06)
    # The cabin sits behind the middle: the long bonnet is the front.
    cabin_x = -0.20 + 0.06 * u[..., 4]
    cabin = _box(p, _vec(cabin_x, 0.0, 0.08 + cabin_height), _vec(length * 0.50, width * 0.88, cabin_height), 0.06)
    window = _box(p, _vec(cabin_x, 0.0, 0.12 + cabin_height), _vec(length * 0.515, width * 0.70, cabin_height * 0.55), 0.02)
    m = _mirror(p)
    side = _box(m, _vec(cabin_x, width * 0.88, 0.12 + cabin_height), _vec(length * 0.40, 0.02, cabin_height * 0.55), 0.01)
    wheels = torch.minimum(
        _cylinder(m, _vec(length * 0.58, width * 0.92, -0.30), wheel, 0.09, axis=1),
        _cylinder(m, _vec(-length * 0.58, width * 0.92, -0.30), wheel, 0.09, axis=1),
    )
    lamps = (m - _vec(length, width * 0.62, -0.06)).norm(dim=-1) - 0.08
    return [(body, MAIN), (cabin, MAIN), (window, "glass"), (side, "glass"), (wheels, "dark"), (lamps, "lamp")]


def _chair(p: Tensor, u: Tensor) -> list[Part]:
    half, back = 0.42 * (1 + 0.12 * u[..., 0]), 0.40 * (1 + 0.18 * u[..., 1])
    leg, thick = 0.30 * (1 + 0.15 * u[..., 2]), 0.085 * (1 + 0.2 * u[..., 3])
    zero = torch.zeros_like(half)
    seat_z = -0.12 + zero
    seat = _box(p, _vec(zero, 0.0, seat_z), _vec(half, half, 0.085 + zero), 0.03)
    rest = _box(p, _vec(-half + 0.09, zero, seat_z + back), _vec(0.09 + zero, half, back), 0.03)
    q = torch.cat([p[..., :2].abs(), p[..., 2:]], -1)
    legs = _box(q, _vec(half - thick, half - thick, seat_z - leg), _vec(thick, thick, leg), 0.02)
    return [(seat, MAIN), (rest, MAIN), (legs, MAIN)]


def _mushroom(p: Tensor, u: Tensor) -> list[Part]:
    radius, rise = 0.64 * (1 + 0.12 * u[..., 0]), 0.50 * (1 + 0.18 * u[..., 1])
    zero = torch.zeros_like(radius)
    q = p - _vec(zero, 0.0, 0.05)
    cap = torch.maximum(_ellipsoid(q, (0, 0, 0), _vec(radius, radius, rise)), -q[..., 2])
    # Cream spots, a top one and five around: from above they tell a mushroom from a ball.
    spots = (q - _vec(zero, 0.0, rise)).norm(dim=-1) - 0.13
    for angle_deg in (0.0, 72.0, 144.0):
        x, y = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
        spots = torch.minimum(spots, (_mirror(q) - _vec(0.8 * x * radius, 0.8 * y * radius, 0.6 * rise)).norm(dim=-1) - 0.12)
    stem = _cylinder(p, _vec(zero, 0.0, -0.28), 0.19 * (1 + 0.2 * u[..., 2]), 0.36 * (1 + 0.15 * u[..., 3]), rounding=0.05)
    return [(cap, MAIN), (torch.maximum(spots, cap - 0.015), "cream"), (stem, "cream")]


def _tree(p: Tensor, u: Tensor) -> list[Part]:
    w = 0.54 * (1 + 0.12 * u[..., 0])
    top = 0.85 * (1 + 0.08 * u[..., 1])
    zero = torch.zeros_like(w)
    low, middle = -0.42 + 0.06 * u[..., 2], -0.02 + zero
    skirts = [_cone(p, low, low + 0.75, w), _cone(p, middle, top, w * 0.76 * (1 + 0.12 * u[..., 3]))]
    trunk = _cylinder(p, _vec(zero, 0.0, low - 0.18), 0.15 * (1 + 0.25 * u[..., 4]), 0.24)
    return [*((s, MAIN) for s in skirts), (trunk, "wood")]


def _house(p: Tensor, u: Tensor) -> list[Part]:
    length, width = 0.50 * (1 + 0.1 * u[..., 0]), 0.46 * (1 + 0.1 * u[..., 1])
    wall, rise = 0.32 * (1 + 0.15 * u[..., 2]), 0.46 * (1 + 0.2 * u[..., 3])
    zero = torch.zeros_like(length)
    z0 = -0.72 + zero
    walls = _box(p, _vec(zero, zero, z0 + wall), _vec(length, width, wall), 0.02)
    # Ridge along x: the front (+x) shows the gable, above the door.
    eave = z0 + 2 * wall - 0.04
    half_span = width + 0.13
    slope = (rise.square() + half_span.square()).sqrt()
    roof = (p[..., 1].abs() * rise + (p[..., 2] - eave - rise) * half_span) / slope
    roof = torch.maximum(torch.maximum(roof, eave - p[..., 2]), p[..., 0].abs() - length - 0.10)
    door = _box(p, _vec(length, zero, z0 + wall * 0.62), _vec(0.03 + zero, 0.14 * (1 + 0.2 * u[..., 4]), wall * 0.62), 0.01)
    m = _mirror(p)
    windows = _box(m, _vec(0.0 * zero, width, z0 + wall * 1.05), _vec(0.15 + zero, 0.025, wall * 0.35), 0.01)
    return [(walls, "cream"), (roof, MAIN), (door, "wood"), (windows, "glass")]


OBJECTS: dict[str, Callable[[Tensor, Tensor], list[Part]]] = {
    "ball": _ball, "cube": _cube, "cone": _cone_object, "donut": _donut, "mug": _mug, "duck": _duck,
    "snowman": _snowman, "car": _car, "chair": _chair, "mushroom": _mushroom, "tree": _tree, "house": _house,
}  # fmt: skip
# Those that look different from the front and from behind. The embedded CLIP finds the right view words of 82 % of held-out renders of
# these (384, front, side, back and overhead), and of 61 % of the others.
WITH_A_FRONT = ("mug", "duck", "snowman", "car", "chair", "house")


def signed_distance(name: str, points: Tensor, proportions: Tensor) -> Tensor:
    """Evaluate an object's signed distance (negative inside; a lower bound of the true distance near sharp edges).

    Args:
        name: one of OBJECTS.
        points: (..., 3) scene coordinates.
        proportions: (..., NUM_PROPORTIONS) in [-1, 1], broadcastable with ``points``; zeros give the canonical object.

    Returns:
        (...,) signed distances in scene units.
    """
    return torch.stack([distance for distance, _ in OBJECTS[name](points, proportions)], -1).amin(-1)


def albedo(name: str, color: str, points: Tensor, proportions: Tensor) -> Tensor:
    """Return the (..., 3) colour, in [0, 1], of the part nearest to each of ``points`` (shapes as signed_distance)."""
    parts = OBJECTS[name](points, proportions)
    nearest = torch.stack([distance for distance, _ in parts], -1).argmin(-1)
    palette = points.new_tensor([COLORS[color] if material == MAIN else ACCENTS[material] for _, material in parts])
    return palette[nearest]
