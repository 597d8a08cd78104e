"""Beside which layers of a prior's network phi's LoRA may stand, by the names of score.targets."""

from __future__ import annotations

from collections.abc import Collection, Sequence

FLOW_TARGETS = ("attention", "feedforward")


def require_targets(targets: Sequence[str], known: Collection[str]) -> None:
    """Refuse layers that a network has not; ValueError in one line.

    Args:
        targets: that are asked for.
        known: that the network has.
    """
    absent = [target for target in targets if target not in known]
    if absent:
        raise ValueError(f"score.targets: this prior's network has no {absent[0]} that LoRA may stand beside: use {' '.join(known)}")
