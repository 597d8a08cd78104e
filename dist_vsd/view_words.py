"""What a prompt says of where its picture is seen from. Apart from the cameras, so that reading a configuration imports no torch."""

from __future__ import annotations

import math

VIEW_WORDS = ("front view", "side view", "back view", "overhead view")


def view_words(azimuth_deg: float, elevation_deg: float, overhead_deg: float = 60.0, front_deg: float = 45.0) -> str:
    """Say in words from where a camera looks (DreamFusion, section 3.2, view-dependent prompting).

    Args:
        azimuth_deg: degrees, 0 in front.
        elevation_deg: degrees above the horizon.
        overhead_deg: the elevation above which a view is overhead, whatever its azimuth.
        front_deg: half the width of the front sector; the back sector is as wide.

    Returns:
        One of VIEW_WORDS.
    """
    if elevation_deg > overhead_deg:
        return "overhead view"
    from_front = abs(math.remainder(azimuth_deg, 360.0))
    if from_front < front_deg:
        return "front view"
    return "back view" if from_front > 180.0 - front_deg else "side view"
